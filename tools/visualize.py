"""Draw ranked lists, activation maps and the stages of images, for a checkpoint and a split."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.distributed.processes import refuse_sharing
from engine.report import DIRECTIONS
from tools.lib.attacking import checkpoint_config
from tools.lib.command_line import Parser, add_json, answer, exit_code_of, shown, whole_number
from tools.lib.drawing import Drawing
from utils.config_tree import changed
from utils.device import set_threads

_NAMES = ["->".join(direction) for direction in DIRECTIONS]
_EXAMPLES = """examples:
  python3 tools/visualize.py ranks demo/full                      best, median and worst queries
  python3 tools/visualize.py ranks demo/full --direction "raw->protected" --random 8
  python3 tools/visualize.py ranks demo/full --query 0081_c1s1_035135_00.jpg
  python3 tools/visualize.py maps demo/full --random 4
  python3 tools/visualize.py strips demo/full --split val --output strips

Images of real people show real people: think before you share the files.
"""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    args = _parse(argv)

    def work() -> None:
        refuse_sharing("tools/visualize.py")
        with answer(as_json=args.json) as show:
            paths = [str(path) for path in _draw(args)]
            show(paths, "\n".join(map(shown, paths)))

    return exit_code_of(work, "interrupted; finished files are complete")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    parser.add_argument(
        "kind", choices=("ranks", "maps", "strips"),
        help="ranks: the gallery images most similar to queries, with hits and misses; maps: where "
        "the re-ID network responds; strips: every stage from raw to sealed and recovered",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="OUTPUT_DIR of a training")
    parser.add_argument(
        "--output", type=Path, default=Path("visualizations"), metavar="DIR",
        help="folder for the PNG files (default: visualizations)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("test", "val"), help="split (default: EVAL.SPLIT, usually test)"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--query", action="append", default=[], metavar="NAME",
        help="the query image whose path ends with NAME; may be given several times",
    )  # fmt: skip
    chosen.add_argument(
        "--random", type=whole_number(1, 1000), metavar="N",
        help="N random queries (default of maps and strips: 6)",
    )  # fmt: skip
    chosen.add_argument(
        "--each", type=whole_number(1, 100), metavar="N",
        help="ranks: the N best, median and worst queries (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--direction", action="append", choices=_NAMES, metavar="NAME",
        help=f"ranks: one of {', '.join(_NAMES)}; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=whole_number(1, 50), metavar="K",
        help="ranks: gallery images per query (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--key", choices=("right", "wrong", "ciphertext"),
        help="ranks and maps: key state in which protected images are read (default: right)",
    )  # fmt: skip
    add_json(parser)
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys that override config.yml"
    )
    args = parser.parse_intermixed_args(argv)
    unused = {"ranks": (), "maps": ("each", "direction", "top")}.get(
        args.kind, ("each", "direction", "top", "key")
    )
    for name in unused:
        if getattr(args, name) is not None:
            parser.error(f"--{name} has no effect on {args.kind}")
    return args


def _draw(args: argparse.Namespace) -> Sequence[Path]:
    cfg, _ = checkpoint_config(args.checkpoint, args.opts)
    if args.split:
        cfg = changed(cfg, {"EVAL.SPLIT": args.split})
    set_threads(cfg.RUNTIME.THREADS)
    drawing = Drawing(cfg, args.output)
    if args.kind == "strips":
        return [drawing.strips(drawing.chosen(args.query, args.random or 6))]
    if args.kind == "maps":
        return [drawing.maps(drawing.chosen(args.query, args.random or 6), args.key or "right")]
    directions = [DIRECTIONS[_NAMES.index(name)] for name in args.direction or _NAMES]
    chosen = drawing.chosen(args.query, args.random) if args.query or args.random else None
    return drawing.ranks(
        directions, args.key or "right", chosen=chosen, each=args.each or 3, top=args.top or 10
    )


if __name__ == "__main__":
    sys.exit(main())
