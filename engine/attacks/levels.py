"""Whom an attacker knows and whom he is after: images of public and of private persons.

What is stored at each level of protection, and what an outsider sees of it.

How one sealed image lies in a file, whatever its scheme.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.records import Sample
from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.build import CIPHERS
from modeling.encryption.additive import NotSecureWarning
from modeling.encryption.cipher import Cipher, Sealed
from modeling.encryption.png_format import decode, encode
from modeling.encryption.sealed_image import MAGIC, SealedImage
from utils.errors import UserError
from utils.seeding import numpy_generator

MINIMUM_PERSONS = 6
_VALIDATION_SHARE = 6  # one public person in so many is held out
_VALIDATION_IMAGES = (64, 512)  # least and most of them that are looked at
_IMAGES_EACH = 8  # of a held-out person: attacks on several images of one need some


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images of some persons, as decoded: 8-bit, on the CPU.

    Attributes:
        raw, desensitized: uint8 (N, 3, H, W).
        pids, camids: int64 (N,).
        subjects: Label that each image's owner encrypts it under.
        is_query: Whether an image is looked with (or else for), bool (N,).
    """

    raw: Tensor
    desensitized: Tensor
    pids: Tensor
    camids: Tensor
    subjects: tuple[str, ...]
    is_query: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.raw)

    @property
    def num_persons(self) -> int:
        """Number of distinct persons."""
        return len(torch.unique(self.pids))

    def take(self, index: Tensor) -> ImageSet:
        """Return some of the images, by place (or by a mask)."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return ImageSet(
            self.raw[index],
            self.desensitized[index],
            self.pids[index],
            self.camids[index],
            tuple(self.subjects[place] for place in index.tolist()),
            self.is_query[index],
        )


@dataclass(frozen=True)
class Cast:
    """Samples of the persons of an attack.

    Attributes:
        public: What attackers train on, in an order drawn once: a smaller budget is a prefix.
        validation: Held-out public persons, by which an attacker chooses what he keeps.
        private: Query and gallery images of the persons that attacks are scored on.
        is_query: Whether each private sample is a query.
    """

    public: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    private: tuple[Sample, ...]
    is_query: tuple[bool, ...]


def choose_people(
    train: Sequence[Sample],
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    *,
    budget: int,
    people: int,
    seed: int,
) -> Cast:
    """Deal persons to the roles of an attack.

    Public persons are the training identities, private ones those that are both in query and
    gallery; distractors take no part.

    Args:
        train: Training samples of the data set.
        query: Its test queries.
        gallery: Its test gallery.
        budget: Most public images that an attacker trains on.
        people: Most private persons.
        seed: Of the deal.

    Raises:
        UserError: There are too few persons or images.
    """
    rng = numpy_generator(seed, "attack people")
    known = [int(pid) for pid in rng.permutation(sorted({s.pid for s in train}))]
    held_out = set(known[: max(2, len(known) // _VALIDATION_SHARE)])
    _check_count("public", len(known), "training identities")
    order = rng.permutation(len(train))
    shuffled = [train[place] for place in order]
    public = [s for s in shuffled if s.pid not in held_out]
    of_person = {pid: [s for s in shuffled if s.pid == pid] for pid in known if pid in held_out}
    validation = [s for images in of_person.values() for s in images[:_IMAGES_EACH]]
    if budget > len(public):
        raise UserError(
            f"--budget is {budget}, but the public persons have {len(public)} images to train on, "
            f"besides those held out; expected at most {len(public)}"
        )
    least, most = _VALIDATION_IMAGES
    both = sorted({s.pid for s in query} & {s.pid for s in gallery})
    _check_count("private", len(both), "test identities with query and gallery images")
    chosen = {int(pid) for pid in rng.permutation(both)[:people]}
    sides = [(s, True) for s in query] + [(s, False) for s in gallery]
    kept = [(s, is_query) for s, is_query in sides if s.pid in chosen]
    return Cast(
        public=tuple(public[:budget]),
        validation=tuple(validation[: min(max(budget // 2, least), most)]),
        private=tuple(s for s, _ in kept),
        is_query=tuple(is_query for _, is_query in kept),
    )


def _check_count(which: str, found: int, what: str) -> None:
    if found < MINIMUM_PERSONS:
        raise UserError(
            f"the data set has {found} {which} persons ({what}); expected at least "
            f"{MINIMUM_PERSONS}: an interval over fewer says nothing"
        )


CLEAR_LEVELS = ("raw", "desensitized", "anonymized")
ENCRYPTED_LEVELS = tuple(CIPHERS)  # no scheme is left out
LEVELS = (*CLEAR_LEVELS, *ENCRYPTED_LEVELS)

# An attacker's own identity numbers: no data set has them, so none of his pads is a private one.
_OWN_PERSONS = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Stored:
    """N images as they are stored at one level.

    Attributes:
        level: Name of the level.
        plain: Normalised images before encryption, float32 (N, 3, H, W), as a key gives them back.
        observed: What an outsider sees, normalised, float32 (N, 3, H, W).
        cipher: The scheme with its owner's keys; None at levels without encryption.
        sealed: The ciphertexts; None likewise.
    """

    level: str
    plain: Tensor
    observed: Tensor
    cipher: Cipher | None = None
    sealed: Sealed | None = None


@dataclass(frozen=True)
class Protector:
    """Turns raw images into what is stored.

    Attributes:
        anonymizer: The public anonymizer; None if the checkpoint has none.
        device: Where it runs.
        autocast: Context that it runs in.
        pixels: Pixel space of its images.
        batch_size: Images per batch.
    """

    anonymizer: nn.Module | None
    device: torch.device
    autocast: Autocast
    pixels: PixelSpace
    batch_size: int

    @torch.inference_mode()
    def plain(self, images: ImageSet, level: str) -> Tensor:
        """Return the images of a level before encryption, normalised, float32, on the CPU."""
        if level in ("raw", "desensitized"):
            return self.pixels.normalize(images.raw if level == "raw" else images.desensitized)
        if self.anonymizer is None:
            raise ValueError(f"level {level} needs an anonymizer")
        parts = []
        for batch in self.pixels.normalize(images.raw).split(self.batch_size):
            with self.autocast():
                anonymized = self.anonymizer(batch.to(self.device))
            parts.append(anonymized.float().cpu())
        return torch.cat(parts)


def seal(level: str, plain: Tensor, subjects: Sequence[str]) -> Stored:
    """Store plain images (N, 3, H, W) at a level, each under the key of its subject."""
    if level in CLEAR_LEVELS:
        return Stored(level, plain, plain)
    cipher = new_cipher(level)
    sealed = cipher.seal(plain, subjects)
    return Stored(level, cipher.quantize(plain), cipher.observe(sealed), cipher, sealed)


def new_cipher(level: str) -> Cipher:
    """Return a cipher with keys of its own."""
    with warnings.catch_warnings():  # that it is not secure is what is measured here
        warnings.simplefilter("ignore", NotSecureWarning)
        return CIPHERS[level]()


def own_subjects(persons: Sequence[int]) -> tuple[str, ...]:
    """Return labels of persons that an attacker makes up, to encrypt under keys of his own."""
    return tuple(f"attacker/own/{_OWN_PERSONS + int(person)}" for person in persons)


def own_key_per_person(level: str, plain: Tensor, pids: Tensor) -> Stored:
    """Store public images as an attacker imitates the owner: a key of his own for each person."""
    return seal(level, plain, own_subjects(pids.tolist()))


def fresh_observer(level: str) -> Callable[[Tensor], Tensor]:
    """Return what shows plain images as an outsider would see them, each under a new own key."""
    count = 0

    def observe(plain: Tensor) -> Tensor:
        nonlocal count
        if level in CLEAR_LEVELS:
            return plain
        persons = range(count, count + len(plain))
        count += len(plain)
        return seal(level, plain, own_subjects(persons)).observed

    return observe


_REACH = 2.0  # of the additive scheme: image and pad are each in [-1, 1]


def holds_bytes(sealed: Sealed) -> bool:
    """Whether a scheme stores bytes; otherwise it stores numbers, which files have to round."""
    return sealed.payload.dtype == torch.uint8


def is_ised(sealed: Sealed) -> bool:
    """Whether images are sealed as docs/ISED.md says, so that its files hold them."""
    return holds_bytes(sealed) and all(header.startswith(MAGIC) for header in sealed.headers)


def file_size(one: Sealed) -> int:
    """Return the bytes of a file of one image; the values of a scheme without files of its own."""
    return len(encode(_picture(one))) if is_ised(one) else one.payload.numel()


def through_file(one: Sealed) -> Sealed:
    """Write one sealed image as a file would hold it, and read it back.

    Bytes of a scheme without files of its own come back as they are. Numbers are saved in the best
    way that 8 bits allow: their whole range on 256 steps.

    Raises:
        FormatError: What is sealed as docs/ISED.md says makes no file.
    """
    if is_ised(one):
        picture = decode(encode(_picture(one)))
        found = np.frombuffer(picture.pixels, np.uint8).reshape(tuple(one.payload.shape))
        return replace(one, payload=torch.from_numpy(found.copy()), headers=(picture.chunk,))
    if holds_bytes(one):
        return one
    reach = max(_REACH, float(one.payload.abs().max()))
    scale = 255 / (2 * reach)
    steps = ((one.payload + reach) * scale).round().clamp(0, 255).to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(steps[0].permute(1, 2, 0).numpy()).save(stream, format="PNG")
    read = torch.from_numpy(np.array(Image.open(stream)))
    return replace(one, payload=read.permute(2, 0, 1)[None].float() / scale - reach)


def _picture(one: Sealed) -> SealedImage:
    height, width = one.payload.shape[1:3]
    return SealedImage(width, height, one.headers[0], one.payload[0].numpy().tobytes())
