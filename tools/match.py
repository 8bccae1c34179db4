"""Decide whether two images show the same person, with a re-ID network and a threshold."""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from PIL import Image

from data.images import BadImage, read_rgb
from engine.api import Anonymizer
from engine.details import HIGHEST_THRESHOLD, load_calibration
from engine.distributed.processes import refuse_sharing
from modeling.encryption.png_format import CHUNK_NAME
from tools.lib.command_line import INTERRUPTED, Parser, add_json, answer, exit_code_of, number
from utils.errors import UserError

_KINDS = ("raw", "protected")
_EXAMPLES = """examples:
  python3 tools/match.py a.jpg b.jpg --checkpoint demo/full
  python3 tools/match.py a.jpg anonymized.png --checkpoint demo/full --kinds raw protected

Prints the cosine similarity of the two embeddings, the threshold and the decision. By default the
threshold comes from the checkpoint's calibration.json, which training writes for the validation
split. Exit code: 0 the same person, 1 not the same person, 2 an error, 130 interrupted.
"""


def _cosine(text: str) -> float:
    try:
        return number(-1, HIGHEST_THRESHOLD)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a cosine from -1 to 1; higher values accept fewer pairs"
        ) from None


def read_image(path: Path) -> Image.Image:
    """Return a raw or anonymized image; raise UserError if it cannot be read, or is sealed."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected an image")
    if path.is_file():
        with path.open("rb") as file:
            if CHUNK_NAME in file.read(64):
                raise UserError(
                    f"{path} is sealed; open it first (tools/protect.py open), and compare the "
                    "anonymized image with --kinds protected"
                )
    try:
        return read_rgb(str(path))
    except BadImage as error:  # its message is about data sets, which may leave an image out
        raise UserError(f"{path}: {error.reason}; use another copy of the image") from error


def compare(args: argparse.Namespace) -> bool:
    """Print the similarity and the decision; return the decision."""
    with answer(as_json=args.json) as show:
        threshold = args.threshold
        if threshold is None:
            threshold = load_calibration(args.checkpoint, *args.kinds).threshold
        similarity = _similarity(args)
        same = similarity >= threshold
        text = "the same person" if same else "not the same person"
        show(
            {"similarity": similarity, "threshold": threshold, "same_person": same},
            f"cosine {similarity:.4f}, threshold {threshold:.4f}: {text}",
        )
    return same


def _similarity(args: argparse.Namespace) -> float:
    model = Anonymizer.from_checkpoint(args.checkpoint, device=args.device)
    first, second = (model.embed(read_image(path)) for path in (args.first, args.second))
    similarity = float((first @ second.T).item())
    if not math.isfinite(similarity):
        raise UserError(
            f"the network of {args.checkpoint} returns {similarity} for these images; check the "
            "losses of its training"
        )
    return similarity


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("first", type=Path, help="query image")
    parser.add_argument("second", type=Path, help="gallery image")
    parser.add_argument("--checkpoint", type=Path, required=True, help="OUTPUT_DIR of a training")
    parser.add_argument(
        "--kinds", nargs=2, choices=_KINDS, default=["raw", "raw"], metavar=("FIRST", "SECOND"),
        help="kinds of the two images: raw, or protected (anonymized, not sealed) "
        "(default: raw raw)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=_cosine, metavar="COSINE",
        help="smallest cosine of the same person, -1 to 1 (default: from calibration.json)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_json(parser)
    args = parser.parse_args(argv)
    answers: list[bool] = []

    def work() -> None:
        refuse_sharing("tools/match.py")
        answers.append(compare(args))

    try:
        failed = exit_code_of(work)
    except Exception:  # Python would exit with 1, which means another person
        traceback.print_exc()
        failed = 2
    if failed:
        return INTERRUPTED if failed == INTERRUPTED else 2
    return 0 if answers[0] else 1


if __name__ == "__main__":
    sys.exit(main())
