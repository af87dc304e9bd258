"""Serve models to programs that speak OpenAI's API, and to a browser.

python -m src.inference.serve [MODEL]                       the newest weights under out/, or MODEL
python -m src.inference.serve --model a=out/A --model b=B   several; the first is the default
python -m src.inference.serve --run out/X                   also shows the run, while it trains
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import uvicorn

from src.adapt.adapter_files import CONFIG as ADAPTER_CONFIG
from src.errors import UserError
from src.inference.adaptation import Adaptation
from src.inference.arguments import (
    add_adapter_details,
    add_chat_template_argument,
    add_sampling_arguments,
    add_think_argument,
    sampling_from,
)
from src.inference.decoder import Decoder
from src.inference.load import (
    DTYPES,
    find_model,
    find_tokenizer,
    latest_trained_weights,
    load_model,
    load_weights,
    pretrained_only,
)
from src.inference.serve.app import AppSettings, make_app
from src.inference.serve.engine import Engine
from src.inference.serve.fair_lock import FairLock
from src.inference.serve.listening import bind, serve
from src.inference.serve.live_run import LiveRun
from src.inference.serve.registry import Registry
from src.inference.serve.request import Start
from src.inference.serve.served_model import ServedModel
from src.inference.serve.tuned_states import read_start
from src.inference.template_choice import find_template
from src.model import RWKV7
from src.run_folder import ALL_RESULTS, LOG, METRICS

# Of connections that are idle. Short ones are closed while a client begins its next request, which then fails.
KEEP_ALIVE_SECONDS = 75
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m src.inference.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="", help="as for the chat")
    parser.add_argument(
        "--model", dest="models", metavar="NAME=PATH", action="append", default=[], help="a further model; repeatable"
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help='of the first model, which is also served with it merged, as MODEL:NAME or "adapter": NAME; repeatable',
    )
    parser.add_argument(
        "--state",
        dest="states",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help='tuned initial states for the first model, for requests with "state": NAME; repeatable',
    )
    add_adapter_details(parser)
    parser.add_argument("--tokenizer", default="", help='"world" or a Hugging Face folder; default: that of the run')
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", default=None, help="default: the first GPU, without one cpu")
    add_chat_template_argument(parser, "the tokenizer's, for a pretraining run none")
    add_think_argument(parser, "a request may say otherwise")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s: this machine only]")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free [%(default)s]")
    parser.add_argument(
        "--api_key", action="append", default=[], help="key that clients must send; repeatable; or RWKV_API_KEY"
    )
    parser.add_argument("--insecure", action="store_true", help="listen on other addresses without a key")
    parser.add_argument("--cors_origin", action="append", default=[], help="web page that may call the API; repeatable")
    parser.add_argument("--max_batch", type=int, default=32, help="answers that are written together [%(default)s]")
    parser.add_argument("--max_waiting", type=int, default=256, help="requests that may wait [%(default)s]")
    parser.add_argument("--max_tokens", type=int, default=16384, help="most tokens of an answer [%(default)s]")
    parser.add_argument("--length", type=int, default=1024, help="tokens of an answer, unless asked for [%(default)s]")
    parser.add_argument("--state_cache_mb", type=int, default=1024, help="kept states, of each model [%(default)s]")
    parser.add_argument("--body_limit_mb", type=int, default=8, help="largest request [%(default)s]")
    parser.add_argument("--request_seconds", type=float, default=600, help="time limit of a request [%(default)s]")
    parser.add_argument("--drain_seconds", type=float, default=30, help="to finish answers at the end [%(default)s]")
    parser.add_argument("--run", type=Path, default=None, help="a run's folder to show; MODEL's, where it lies in one")
    add_sampling_arguments(parser)
    return parser, parser.parse_args(argv)


def load(options: argparse.Namespace) -> list[ServedModel]:
    """The models that `options` name: the first one, it with each adapter, the others. Raises UserError."""
    named = [_named("model", text) for text in options.models]
    model = options.model or (str(options.run) if options.run is not None else "")
    if model or not named:
        unnamed = Path(model) if model else latest_trained_weights(Path("out"))
        named.insert(0, (_name_of(unnamed), str(unnamed)))
    (first, path), *others = named
    adapters = [(f"{first}:{name}", path, adapter) for name, adapter in _all_named("adapter", options.adapters)]
    served = [(first, path, ""), *adapters, *((name, path, "") for name, path in others)]
    _refuse_twice("model", [name for name, _, _ in served])
    if options.state_layout and not options.states and not any(find_model(path)[1].state for _, path, _ in served):
        raise UserError("needs --state", flag="state_layout", given=options.state_layout)
    lock = FairLock()
    models = [load_one(name, path, options, lock, adapter) for name, path, adapter in served]
    states = read_states(options, path, models[0].engine.model)
    for each in models[: 1 + len(adapters)]:
        each.tuned_states.update(states)
    return models


def read_states(options: argparse.Namespace, path: str, model: RWKV7) -> dict[str, Start]:
    """The values of --state, for `model`, which lies at `path`. Raises UserError."""
    named = _all_named("state", options.states)
    if not named:
        return {}
    weights = load_weights(find_model(path)[0])
    found = {}
    for name, state in named:
        adaptation = Adaptation(state=state, state_layout=options.state_layout, other_base=options.other_base)
        found[name] = read_start(name, adaptation, weights, model)
    return found


def load_one(name: str, path: str, options: argparse.Namespace, lock: FairLock, adapter: str = "") -> ServedModel:
    """A model with its engine; `adapter` is merged into it. Raises UserError."""
    given = Adaptation(adapter, lora_alpha=options.lora_alpha, other_base=options.other_base)
    weights, adaptation = find_model(path, given)
    if adaptation.state:  # `path` is a run that tuned it
        adaptation = replace(adaptation, state_layout=options.state_layout)
    model = load_model(weights, options.dtype, options.device, adaptation)
    Decoder(model, pack=False).step([0])  # compiles the kernels where they aren't yet
    tokenizer = find_tokenizer(weights, model.config.vocab_size, options.tokenizer, adaptation)
    template = find_template(options.chat_template, tokenizer, pretrained_only(weights, adaptation), options.think)
    engine = Engine(
        model,
        tokenizer,
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        cache_bytes=options.state_cache_mb << 20,
        device_lock=lock,
    )
    return ServedModel(name, engine, tokenizer, template, sampling_from(options), options.length, options.max_tokens)


def live_run(options: argparse.Namespace, registry: Registry) -> LiveRun | None:
    """The run that the page shows: --run, else the folder in which the first model lies if it is a run's."""
    first = registry.models[0]
    folder = options.run
    if folder is None:
        path = Path(options.model or (options.models[0].partition("=")[2] if options.models else ""))
        if not (options.model or options.models):
            path = latest_trained_weights(Path("out"))
        folder = path if path.is_dir() and not (path / ADAPTER_CONFIG).is_file() else path.parent
    if not ((folder / METRICS).is_file() or (folder / LOG).is_file()):
        return None

    def load_newer(name: str, weights: Path) -> ServedModel:
        model = load_one(name, str(weights), options, first.engine.device_lock)
        model.tuned_states.update(first.tuned_states)
        return model

    return LiveRun(folder, registry, first.name, load_newer)


def _named(flag: str, text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(flag=flag, given=text, expected="NAME=PATH, for example small=out/L12-D768-x070")
    return name, path


def _all_named(flag: str, texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of NAME=PATH; a PATH alone is named by itself."""
    named = [_named(flag, text) if "=" in text else (_name_of(Path(text)), text) for text in texts]
    _refuse_twice(flag, [name for name, _ in named])
    return named


def _refuse_twice(flag: str, names: list[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError("used twice", flag=flag, given=twice, expected="another NAME=PATH")


def _name_of(path: Path) -> str:
    """Of a run, or of what lies in one under the run's own names, the folder's name; else the file's."""
    if not path.is_dir() and not path.is_file():
        return path.name
    of_run = any(result.matches(path.name) for result in ALL_RESULTS)
    folder = path.resolve().parent if of_run else path.resolve()
    return folder.name if of_run or path.is_dir() else path.stem


def check(options: argparse.Namespace) -> None:
    """Raises UserError for settings that can't be used."""
    bounds = {"max_batch": 1, "max_waiting": 1, "max_tokens": 1, "length": 1, "state_cache_mb": 0, "body_limit_mb": 1}
    for name, least in bounds.items():
        if getattr(options, name) < least:
            raise UserError(flag=name, given=getattr(options, name), expected=f"at least {least}")
    for name in ("request_seconds", "drain_seconds"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise UserError(flag=name, given=getattr(options, name), expected="a number of seconds")
    if not 0 <= options.port < 65536:
        raise UserError(flag="port", given=options.port, expected="0 to 65535")
    if options.length > options.max_tokens:
        raise UserError(flag="length", given=options.length, expected=f"at most --max_tokens {options.max_tokens}")
    if not is_loopback(options.host) and not options.api_key and not options.insecure:
        raise UserError(
            "other machines could use the server without a key",
            flag="host",
            given=options.host,
            advice="give --api_key KEY, or --insecure if the network is trusted",
        )


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    parser, options = parse(argv)
    options.api_key += [key] if (key := os.environ.get("RWKV_API_KEY")) else []
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have gone
    try:
        check(options)
        listener = bind(options.host, options.port)  # before seconds are spent on loading
        registry = Registry(load(options))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:  # while a model is loaded
        return 130
    settings = AppSettings(
        api_keys=tuple(options.api_key),
        body_limit=options.body_limit_mb << 20,
        request_seconds=options.request_seconds,
        drain_seconds=options.drain_seconds,
        hosts=LOOPBACK_NAMES if is_loopback(options.host) else (),
        cors_origins=tuple(options.cors_origin),
    )
    app = make_app(registry, settings, live_run(options, registry))
    config = uvicorn.Config(
        app,
        log_level="error",  # its own messages would repeat every request
        access_log=False,
        timeout_graceful_shutdown=math.ceil(options.drain_seconds),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    return serve(config, listener, [model.name for model in registry.models])
