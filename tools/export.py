"""Export the trained networks as ONNX files for 8-bit images, each compared with PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.distributed.processes import refuse_sharing
from engine.export import DEFAULT_OPSET, OPSETS, VERBS, export, pack
from tools.lib.command_line import Parser, add_json, answer, exit_code_of, shown, whole_number
from utils.files import locked_folder

_EXAMPLES = """examples:
  python3 tools/export.py demo/full exported
  python3 tools/export.py demo/full camera --networks anonymize
  python3 tools/export.py demo/full exported --networks anonymize embed --opset 15 --overwrite
  python3 tools/export.py log/run to_share --pack

The input of a file is uint8 RGB (N, H, W, 3) at the networks' size. The output is images of the
same kind (anonymize, recover) or embeddings of unit length (embed). Each file is compared with
PyTorch before it is saved. A mismatch aborts the export.

A camera needs only anonymize.onnx. Store recover.onnx with the keys: it turns anonymized images
into photographs.

--pack writes a folder that can be shared as a checkpoint: OUTPUT_DIR of a training contains images
of the data set (EVAL.IMAGES), the packed folder does not.

Needs the packages onnx and onnxruntime: python3 -m pip install onnx onnxruntime
Exit code: 0 done, 1 a file cannot be made or differs from its network, 2 wrong input,
130 interrupted. How to run the files, and their metadata: docs/EXPORT.md.
"""


def run(args: argparse.Namespace) -> None:
    """Export, and print a line for each file."""
    refuse_sharing("tools/export.py")
    verbs = list(dict.fromkeys(args.networks or VERBS))
    options = {"opset": args.opset or DEFAULT_OPSET, "overwrite": args.overwrite}
    with answer(as_json=args.json) as show:
        with locked_folder(args.output):
            if args.pack:
                paths = pack(args.checkpoint, args.output, overwrite=args.overwrite)
                files = [{"file": path, "bytes": path.stat().st_size} for path in paths]
            else:
                files = [
                    {"file": file.path, "bytes": file.size, "parity": str(file.parity)}
                    for file in export(args.checkpoint, args.output, verbs, **options)
                ]
        show(files, "\n".join(map(_line, files)))


def _line(file: dict[str, Any]) -> str:
    parity = f"; compared with PyTorch: {file['parity']}" if "parity" in file else ""
    return shown(f"{file['file']}: {file['bytes'] / 2**20:.1f} MiB{parity}")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="OUTPUT_DIR of a training in mode GCR")
    parser.add_argument("output", type=Path, help="folder for the files")
    parser.add_argument(
        "--networks", nargs="+", choices=tuple(VERBS), metavar="NETWORK",
        help=f"one or more of {', '.join(VERBS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--opset", type=whole_number(*OPSETS), metavar="N",
        help=f"version of the ONNX operators, {OPSETS[0]} to {OPSETS[1]}; lower for older runtimes "
        f"(default: {DEFAULT_OPSET})",
    )  # fmt: skip
    parser.add_argument(
        "--pack", action="store_true",
        help="copy weights, config.yml, results.json and calibration.json, without images, instead",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.pack and (args.networks or args.opset):
        parser.error("--pack copies all networks as they are; leave --networks and --opset out")
    return exit_code_of(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
