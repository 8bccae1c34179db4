"""Images of an evaluation, written as PNG files: ranked lists, activation maps, strips."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.build import build_eval_loader
from data.loaders import EvalLoader
from data.records import Batch
from engine.evaluation import Evaluator, Extraction, build_evaluation
from engine.scoring.retrieval import score_retrieval
from engine.views import (
    Pixels,
    RankedList,
    activation_maps,
    choose_queries,
    draw_ranked_lists,
    image_grid,
    overlay,
    rank_gallery,
    save_image,
)
from modeling.build import CIPHERS
from modeling.encryption.cipher import read_sealed
from modeling.privacy_networks import PrivacyNetworks
from utils.errors import UserError
from utils.files import ensure_folder
from utils.logger import Progress
from utils.seeding import numpy_generator


class Drawing:
    """Draws images of the queries and gallery of one evaluation, as PNG files in a folder.

    The evaluator and its features are computed if they are not given; the features only if ranked
    lists are drawn.
    """

    def __init__(
        self,
        cfg: CfgNode,
        output: Path,
        evaluator: Evaluator | None = None,
        extraction: Extraction | None = None,
    ) -> None:
        self._cfg = cfg
        self._output = ensure_folder(output)
        self._evaluator = build_evaluation(cfg).evaluator if evaluator is None else evaluator
        self._extraction = extraction
        self._device = next(self._evaluator.networks.parameters()).device
        self._evaluator.networks.eval()

    @cached_property
    def _features(self) -> Extraction:
        """Features of the whole split."""
        return self._evaluator.extract() if self._extraction is None else self._extraction

    def chosen(self, names: Sequence[str], count: int | None) -> list[int]:
        """Return indices of queries: those whose path ends with a name, or random ones.

        Raises:
            UserError: No query, or more than one, has such a path.
        """
        paths = [str(sample.path) for sample in self._evaluator.query_samples]
        if not names:
            generator = numpy_generator(self._cfg.SOLVER.SEED, "visualize")
            size = min(count or len(paths), len(paths))
            return sorted(generator.choice(len(paths), size, replace=False).tolist())
        indices = []
        for name in names:
            matches = [index for index, path in enumerate(paths) if path.endswith(name)]
            if len(matches) != 1:
                raise UserError(
                    f"{len(matches)} of {len(paths)} query images have a path that ends with "
                    f"'{name}'; expected exactly one, such as '{Path(paths[0]).name}'"
                )
            indices += matches
        return indices

    def ranks(
        self,
        directions: Sequence[tuple[str, str]],
        key: str,
        *,
        chosen: Sequence[int] | None = None,
        each: int = 3,
        top: int = 10,
    ) -> list[Path]:
        """Draw ranked lists, a file for each direction; returns the files.

        Args:
            directions: Pairs of ``raw`` and ``protected``.
            key: Key state in which protected images are read.
            chosen: Queries; None for the best, median and worst of each direction.
            each: Queries in each of these groups.
            top: Gallery images per query.
        """
        sheets = []
        for sides in directions:
            query, gallery = (self._state(side, key) for side in sides)
            names, lists = self._ranked(query, gallery, chosen, each, top)
            sheets.append((sides, (query, gallery), names, lists))
        every = [ranked for *_, lists in sheets for ranked in lists]
        # Directions share images, so each image is decoded and protected once.
        states = {state for _, pair, *_ in sheets for state in pair}
        queries = self._images(self._evaluator.query, {ranked.query for ranked in every}, states)
        galleries = self._images(
            self._evaluator.gallery, {index for ranked in every for index in ranked.gallery}, states
        )
        paths = []
        for sides, (query, gallery), names, lists in sheets:
            sheet = draw_ranked_lists(
                list(zip(names, lists, strict=True)),
                [queries[query][ranked.query] for ranked in lists],
                [[galleries[gallery][index] for index in ranked.gallery] for ranked in lists],
            )
            paths.append(self._output / f"ranks_{'-'.join(sides)}.png")
            save_image(sheet, paths[-1])
        return paths

    def _ranked(
        self,
        query_state: str,
        gallery_state: str,
        chosen: Sequence[int] | None,
        each: int,
        top: int,
    ) -> tuple[list[str], list[RankedList]]:
        """Return the captions and the ranked lists of one direction."""
        query = self._features.query.features[query_state]
        gallery = self._features.gallery.features[gallery_state]
        cross_camera = self._evaluator.cross_camera
        groups = {"": list(chosen or ())}
        if chosen is None:
            scores = score_retrieval(query, gallery, cross_camera=cross_camera)
            groups = choose_queries(scores.per_query, each)
        names = [name for name, indices in groups.items() for _ in indices]
        indices = [index for group in groups.values() for index in group]
        return names, rank_gallery(query, gallery, indices, cross_camera=cross_camera, top=top)

    def maps(self, chosen: Sequence[int], key: str) -> Path:
        """Draw queries with their activation maps, raw and protected; returns the file."""
        reid, pixels = self._evaluator.views.reid, self._evaluator.pixels
        columns: dict[str, list[Tensor]] = {}
        for by_state in self._batches(self._evaluator.query, chosen):
            for name in ("raw", "protected"):
                images = by_state[self._state(name, key)]
                heat = activation_maps(reid, images).cpu().numpy()
                plain = self._to_pixels(images)
                overlaid = np.stack([overlay(*pair) for pair in zip(plain, heat, strict=True)])
                drawn = torch.from_numpy(overlaid).permute(0, 3, 1, 2).float() / 255
                columns.setdefault(name, []).append(images.cpu())
                columns.setdefault(f"{name}: response", []).append(pixels.normalize(drawn))
        return self._saved_grid("maps.png", columns)

    def strips(self, chosen: Sequence[int]) -> Path:
        """Draw every stage of some queries; returns the file.

        Raises:
            UserError: The model is a baseline, which anonymizes nothing.
        """
        networks = self._evaluator.networks
        if not isinstance(networks, PrivacyNetworks):
            raise UserError("the checkpoint is of MODEL.MODE C, which anonymizes no images")
        columns: dict[str, list[Tensor]] = {}
        for batch, subjects in self._loaded(self._evaluator.query, chosen):
            with torch.inference_mode(), self._evaluator.autocast():
                anonymized = networks.anonymizer(batch.raw).float()
                stages = {"raw": batch.raw, "desensitized": batch.desensitized}
                stages["anonymized"] = anonymized
                published, cipher = CIPHERS["additive"](), CIPHERS["aead"]()
                stages["encrypted\n(published)"] = published.observe(
                    published.seal(anonymized, subjects)
                )
                sealed = cipher.seal(anonymized, subjects)
                stages["sealed\n(aead)"] = cipher.observe(sealed)
                stages["opened"] = read_sealed(cipher, sealed, "right").images
                stages["recovered"] = networks.recovery(stages["opened"]).float()
            for name, images in stages.items():
                columns.setdefault(name, []).append(images.cpu())
        return self._saved_grid("strips.png", columns)

    def _saved_grid(self, name: str, columns: Mapping[str, list[Tensor]]) -> Path:
        """Write a grid of the batches of each column, and return the file."""
        grid = {column: torch.cat(parts) for column, parts in columns.items()}
        save_image(image_grid(grid, self._evaluator.pixels), self._output / name)
        return self._output / name

    def _state(self, side: str, key: str) -> str:
        """Return the name of a side's images: ``raw``, or a key state of protected images."""
        if side == "raw":
            return "raw"
        return key if self._evaluator.template.headline_key != "none" else "none"

    def _loaded(
        self, loader: EvalLoader, indices: Sequence[int]
    ) -> Iterator[tuple[Batch, list[str]]]:
        """Yield the images at some indices in batches, with their subject labels."""
        usable = loader.source.usable.tolist()
        samples = [loader.samples[usable[index]] for index in indices]
        with Progress(len(samples), "Draw") as bar:
            for batch in build_eval_loader(self._cfg, samples, self._device):
                yield batch, [samples[index].subject for index in batch.index.tolist()]
                bar.update(len(batch))

    def _batches(self, loader: EvalLoader, indices: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Yield raw images and those of every key state, by name, in batches."""
        for batch, subjects in self._loaded(loader, indices):
            with torch.inference_mode(), self._evaluator.autocast():
                views = self._evaluator.views(batch, subjects)
            yield {"raw": batch.raw, **views.protected}

    def _images(
        self, loader: EvalLoader, indices: Collection[int], states: Collection[str]
    ) -> dict[str, dict[int, Pixels]]:
        """Return images by state and index, 8 bits (H, W, 3)."""
        order = sorted(indices)
        images: dict[str, list[Pixels]] = {state: [] for state in states}
        for batch in self._batches(loader, order):
            for state in states:
                images[state] += list(self._to_pixels(batch[state]))
        return {state: dict(zip(order, each, strict=True)) for state, each in images.items()}

    def _to_pixels(self, images: Tensor) -> Pixels:
        array: Pixels = self._evaluator.pixels.to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()
        return np.ascontiguousarray(array)
