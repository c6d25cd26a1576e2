"""The flags of the command line. Their defaults are those of the Python calls behind them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

TEXT = "text, or @file, whose last newline and byte order mark are not part of the text"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, not the usage as well
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser_of(commands: Mapping[str, Callable], version: str) -> Parser:
    """The parser; `options.command` is then one of `commands`, by its name."""
    parser = Parser(prog="fastweights", description="A Llama whose MLP weights change while it reads and writes.")
    parser.add_argument("--version", action="version", version=f"fastweights {version}")
    subparsers = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    common = Parser(add_help=False)
    common.add_argument("--model", help="folder, Hub name or .gguf file; left out: SmolLM2-135M-Instruct")
    common.add_argument("--dtype", help="float32, bfloat16, …; left out: the checkpoint's own")
    common.add_argument("--device", help="cpu (left out), cuda, …")
    common.add_argument("--strict", action="store_true", help="refuse a config.json with keys that no Llama reads")
    common.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    command = subparsers.add_parser("demo", parents=[common], help="the founding experiment, no further argument")
    command.add_argument("--layers", type=_some_layers, help="all, or 11,12,13 (left out)")
    command.add_argument("--out", metavar="FOLDER", help="save the records and their reports here")
    command.set_defaults(command=commands["demo"])

    run_options = [common, _plastic_options(overflow="grow")]
    command = subparsers.add_parser("run", parents=run_options, help="the experiment on your own texts")
    command.add_argument("--context", type=_text, required=True, help=TEXT)
    command.add_argument("--question", type=_text, required=True, help=TEXT)
    command.add_argument("--answers", type=_names, required=True, help="A,B: the first is the one the context says")
    command.add_argument(
        "--layers", type=_some_layers, required=True, help="11,12,13, or all; -1 is the last (--layers=-1)"
    )
    command.add_argument("--update", type=_update, default="all", help="all, prompt, generated, or positions 10,12,13")
    command.add_argument("--max-new-tokens", type=int, default=0, help="tokens to generate after the context")
    command.add_argument("--probe-every", type=int, default=1, help="ask after every this many events")
    command.add_argument(
        "--out", metavar="FOLDER", help="save record.json, arrays.safetensors, report.html and pictures here"
    )
    command.set_defaults(command=commands["run"])

    generate_options = [common, _plastic_options(overflow="compress")]
    command = subparsers.add_parser("generate", parents=generate_options, help="continue a text")
    command.add_argument("prompt", type=_text, help=TEXT)
    command.add_argument("--layers", type=_some_layers, help="make these layers plastic: 11,12,13, or all")
    command.add_argument(
        "--update",
        type=_update,
        default="generated",
        help="which tokens are written: generated (left out), prompt, all, none, or positions 10,12,13",
    )
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    command.add_argument("--max-new-tokens", type=int, help="left out: 64, or fewer where the context is full before")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (left out) = the likeliest token")
    command.add_argument("--top-k", type=int)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--min-p", type=float, default=0.0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--seed", type=int)
    command.add_argument("--drift", action="store_true", help="say at the end what changed, and where")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop at this text")
    command.set_defaults(command=commands["generate"])

    many = [common, _plastic_options(overflow="compress", many=True)]
    command = subparsers.add_parser("eval-ppl", parents=many, help="perplexity of long texts, frozen against plastic")
    command.add_argument("texts", type=_named_text, nargs="+", metavar="TEXT", help=TEXT)
    command.add_argument("--layers", type=_some_layers, help="make these layers plastic: 11,12,13, or all")
    command.add_argument("--length", type=int, help="tokens of a window; left out: the positions that the model has")
    command.add_argument("--stride", type=int, help="new tokens of a window; left out: --length")
    command.add_argument(
        "--reset",
        choices=("window", "text", "never"),
        default="text",
        help="where events are forgotten; left out: text",
    )
    command.add_argument("--tokens", type=int, help="read this many tokens of each text; left out: all")
    command.add_argument("--buckets", type=_numbers, help="positions where buckets begin; left out: 0,64,128,256, …")
    command.add_argument("--out", metavar="FOLDER", help="save perplexity.json and perplexity.png here")
    command.set_defaults(command=commands["eval-ppl"])

    command = subparsers.add_parser("lens", parents=[common], help="what every layer would say after a text")
    command.add_argument("text", type=_text, help=TEXT)
    command.add_argument("--top", type=int, default=5, help="tokens to show per layer; left out: 5")
    command.add_argument("--answer", type=_text, help="follow the rank of this answer's first token")
    command.add_argument(
        "--site",
        default="resid_post",
        help="where to look: resid_post (left out; with the embedding in front), resid_mid, mlp_out, attn_out, …",
    )
    command.add_argument("--no-norm", dest="norm", action="store_false", help="leave the final norm out")
    command.add_argument("--out", metavar="FOLDER", help="write report.html here")
    command.set_defaults(command=commands["lens"])

    command = subparsers.add_parser("patch", parents=[common], help="a context as rank-1 changes of the weights")
    command.add_argument("--context", type=_text, required=True, help=TEXT)
    command.add_argument("--query", type=_text, required=True, help=f"stands right behind the context: {TEXT}")
    command.add_argument("--layers", type=_some_layers, help="patch these layers: 11,12,13; left out: all")
    command.add_argument(
        "--tokens", type=int, default=0, help="tokens that the model goes on to say, which are patched as well"
    )
    command.add_argument("--out", metavar="FOLDER", help="save report.html and patch.png here")
    command.set_defaults(command=commands["patch"])

    command = subparsers.add_parser("info", parents=[common], help="what a checkpoint is, and a text's token ids")
    command.add_argument("--text", type=_text, help=f"show the ids and tokens of this: {TEXT}")
    command.set_defaults(command=commands["info"])

    subparsers.add_parser("bench", help="measure: see fastweights bench --help")
    return parser


def _plastic_options(overflow: str, many: bool = False) -> Parser:
    """The flags of `attach` and of the rule; `many`: with any number of rates, and gamma by itself."""
    plastic = Parser(add_help=False)
    plastic.add_argument("--linears", type=_names, help="left out: all of the MLP")
    rules = ("hebbian", "local-least-squares", "delta", "gradient-ascent")
    plastic.add_argument("--rule", choices=rules, default="hebbian", help="left out: hebbian")
    if many:
        help_ = "rates, one per row of a batch: 0.001,0.01; of local-least-squares and delta the step towards a*"
        plastic.add_argument("--rate", type=_rates, default=(0.01,), help=help_)
        plastic.add_argument("--gamma", type=float, help="of local-least-squares: a* = a + gamma · z; left out: 1")
    else:
        help_ = "rate; gamma of local-least-squares, beta of delta"
        plastic.add_argument("--rate", type=float, default=0.01, help=help_)
    plastic.add_argument("--mu", type=float, help="added to the squared norm of the key's input")
    plastic.add_argument("--decay", type=float, help="share of the fast weights lost at each event")
    plastic.add_argument("--clip", type=float, help="largest norm of one row of one event")
    plastic.add_argument("--gate", choices=("ones", "positive", "derivative"))
    plastic.add_argument("--target", help="self or slow (local-least-squares), or v* as a safetensors file (delta)")
    plastic.add_argument("--bias", action="store_true", default=None, help="change the bias too")
    plastic.add_argument("--rank", type=int, default=64, help="events to make room for")
    what = f"compress, evict, grow or error: what happens when they are full; left out: {overflow}"
    plastic.add_argument("--overflow", default=overflow, help=what)
    plastic.add_argument("--budget", type=float, help="largest ‖ΔW‖ / ‖W‖ of each linear")
    over = ("scale", "stop")
    plastic.add_argument("--over-budget", choices=over, default="scale", help="what an event over it does")
    return plastic


# ---- from words to values


def _text(value: str) -> str:
    """A text, or @file: without a byte order mark and without the newline that an editor puts at the end."""
    try:
        if not value.startswith("@"):
            return os.fsencode(value).decode("utf-8")  # where the locale knew no UTF-8, Python kept the bytes
        return Path(value[1:]).read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {value.removeprefix('@')}: {error}") from None


def _named_text(value: str) -> tuple[str, str]:
    """A text and what to call it: its file's name, or its beginning."""
    text = _text(value)
    return (Path(value[1:]).name if value.startswith("@") else " ".join(text[:24].split())), text


def _rates(value: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(number) for number in _names(value))
    except ValueError:
        rates = ()
    if not rates:
        raise argparse.ArgumentTypeError(f"{value!r}: expected numbers like 0.001,0.01")
    return rates


def _names(value: str) -> list[str]:
    return [name for name in value.split(",") if name]


def _numbers(value: str) -> list[int]:
    try:
        return [int(number) for number in _names(value)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}: expected whole numbers like 11,12,13") from None


def _some_layers(value: str) -> list[int] | str:
    return value if value == "all" else _numbers(value)


def _update(value: str):
    return value if value in ("all", "none", "prompt", "generated") else _numbers(value)
