"""The ``fi-backend`` command: look at, build, ship and clear compiled kernels."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fi_backend import env
from fi_backend.errors import FiBackendError

if TYPE_CHECKING:
    from fi_backend.jit import KernelSpec

# Options that describe a model without a config file, and the config keys they stand for.
_DIMS = {
    "num_qo_heads": ("num_attention_heads", int, "query heads"),
    "num_kv_heads": ("num_key_value_heads", int, "key/value heads"),
    "head_dim": ("head_dim", int, "elements of one head"),
    "hidden_size": ("hidden_size", int, "elements of one hidden row"),
    "dtype": ("torch_dtype", str, "bfloat16, float16 or float32"),
}


# Options of which a package of prebuilt kernels may combine several values.
_COMBINED = ("head_dim", "dtype", "kv_cache_dtype", "device")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (FiBackendError, OSError, ValueError) as error:
        print(f"fi-backend: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fi-backend: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fi-backend", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    command("show-config", _show_config, "Print versions, compilers, cache and all variables.")
    listing = command("list-modules", _list_modules, "Print the kernel families that exist.")
    listing.add_argument("filter", nargs="?", default="", help="only names that contain this")
    status = command("module-status", _module_status, "Print compiled modules and their state.")
    status.add_argument("--detailed", action="store_true", help="flags, compiler, size, reason")
    status.add_argument("--filter", default="", help="only names that contain this")
    _add_model(status)
    _add_model(command("warmup", _warmup, "Compile all kernels of a model, in parallel."), True)
    clear = command("clear-cache", _clear_cache, "Remove all compiled kernels of this user.")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    commands_json = command("compile-commands", _compile_commands, "Write a file for clangd.")
    commands_json.add_argument("--output", type=Path, default=Path("compile_commands.json"))
    _add_model(commands_json)
    trace = command("trace", _trace, "Write JSON definitions of all public calls for a model.")
    trace.add_argument("--output", type=Path, required=True, metavar="DIR")
    trace.add_argument("--page-size", type=int, default=16, help="tokens a page; default: 16")
    _add_model(trace, required=True)
    aot = command("aot", _aot, "Compile ahead of time, to run where the JIT is disabled.")
    place = aot.add_mutually_exclusive_group(required=True)
    place.add_argument("--out-dir", type=Path, help="directory for FI_BACKEND_AOT_DIR")
    place.add_argument("--wheel", type=Path, metavar="DIR", help="write an installable wheel here")
    aot.add_argument(
        "--isa", action="append", default=[], help="CPU instruction set; repeat for several"
    )
    aot.add_argument(
        "--cuda-arch-list", metavar="LIST", help="as '8.0 9.0a'; default: the GPUs present"
    )
    _add_model(aot, several=_COMBINED)
    return parser


def _add_model(
    parser: argparse.ArgumentParser, required: bool = False, several: Sequence[str] = ()
) -> None:
    """Add the options that describe a model; those named in `several` take more than one value."""
    group = parser.add_argument_group(
        "model", "a config.json, dims, or both" + ("" if required else "; default: what is cached")
    )

    def option(name: str, **settings: Any) -> None:
        if name in several:
            settings |= {"nargs": "+", "default": [settings.pop("default", None)]}
        group.add_argument(f"--{name.replace('_', '-')}", **settings)

    option("model", type=Path, help="config.json of a model, or its directory")
    for name, (_, kind, text) in _DIMS.items():
        option(name, type=kind, help=text)
    option("kv_cache_dtype", help="auto, or fp8_e4m3 or fp8_e5m2")
    option("device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.set_defaults(model_required=required)


def _model_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the model's config with the options put over it; None if nothing was given."""
    values = {key: getattr(arguments, name) for name, (key, _, _) in _DIMS.items()}
    values["kv_cache_dtype"] = arguments.kv_cache_dtype
    given = {key: value for key, value in values.items() if value is not None}
    if arguments.model is None:
        return given or None
    path = arguments.model / "config.json" if arguments.model.is_dir() else arguments.model
    return {**json.loads(path.read_text(encoding="utf-8")), **given}


def _specs(arguments: argparse.Namespace) -> list[KernelSpec]:
    config = _model_config(arguments)
    if config is not None:
        from fi_backend import warmup

        return warmup.specs_for_model(config, arguments.device)
    if arguments.model_required:
        raise ValueError(
            "which kernels? pass --model CONFIG, or dims such as --num-qo-heads 32 "
            "--num-kv-heads 8 --head-dim 128 --dtype bfloat16"
        )
    from fi_backend.jit import registry

    return registry.cached_specs()


def _show_config(arguments: argparse.Namespace) -> None:
    from fi_backend.cli_report import config_lines

    print("\n".join(config_lines()))


def _list_modules(arguments: argparse.Namespace) -> None:
    from fi_backend.cli_report import table
    from fi_backend.jit import registry

    rows = [
        (family.name, family.target, ", ".join(family.parameters) or "-", family.summary)
        for family in registry.families()
        if arguments.filter in family.name
    ]
    print("\n".join(table(("module", "target", "parameters", "what it is"), rows)))


def _module_status(arguments: argparse.Namespace) -> None:
    from fi_backend.cli_report import status_lines

    wanted = _specs(arguments) if _model_config(arguments) is not None else None
    print("\n".join(status_lines(wanted, arguments.filter, detailed=arguments.detailed)))


def _warmup(arguments: argparse.Namespace) -> None:
    from fi_backend.jit import build

    report = build(_specs(arguments))
    print(
        f"compiled {len(report.built)} modules in {report.seconds:.1f} s, "
        f"{len(report.reused)} were there already"
    )


def _clear_cache(arguments: argparse.Namespace) -> int:
    from fi_backend.jit import store

    roots = store.read_roots()
    if not roots:
        print("there is no kernel cache")
        return 0
    if not arguments.yes:
        names = ", ".join(map(str, roots))
        print(f"remove {names}? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 1
    for root in store.clear():
        print(f"removed {root}")
    return 0


def _compile_commands(arguments: argparse.Namespace) -> None:
    from fi_backend.jit import compile_commands

    count = compile_commands.write(_specs(arguments), arguments.output)
    print(f"wrote {arguments.output} with {count} translation units")


def _trace(arguments: argparse.Namespace) -> None:
    from fi_backend import trace, warmup

    config = _model_config(arguments)
    if config is None:
        raise ValueError("which model? pass --model CONFIG, or dims such as --num-qo-heads 32")
    written = [
        trace.write(definition, arguments.output)
        for layer in warmup.model_layers(config, arguments.device)
        for definition in trace.model_definitions(
            replace(layer, page_size=arguments.page_size), config.get("hidden_size")
        )
    ]
    print(f"wrote {len(written)} definitions to {arguments.output}")


def _package_specs(arguments: argparse.Namespace) -> list[KernelSpec]:
    """List the kernels of every combination of the options that take several values."""
    specs: list[KernelSpec] = []
    for values in itertools.product(*(getattr(arguments, name) for name in _COMBINED)):
        choice = argparse.Namespace(**vars(arguments) | dict(zip(_COMBINED, values, strict=True)))
        config = _model_config(choice)
        if config is None:
            return _specs(choice)
        from fi_backend import prebuilt

        specs += prebuilt.package_specs(config, choice.device)
    return list(dict.fromkeys(specs))


def _aot(arguments: argparse.Namespace) -> None:
    from fi_backend.jit import aot, isa

    unknown = sorted(set(arguments.isa) - set(isa.LEVELS))
    if unknown:
        raise ValueError(f"--isa must be one of {', '.join(isa.LEVELS)}, got {', '.join(unknown)}")
    if arguments.cuda_arch_list is not None:
        os.environ[env.CUDA_ARCH_LIST.name] = arguments.cuda_arch_list  # of this process alone
    specs = _package_specs(arguments)
    if not specs:
        raise ValueError("nothing to build: the cache is empty; pass --model or dims")
    # On the CPU a package for GPUs only checks and packs: code that every CPU runs will do.
    levels = arguments.isa or ([] if "cpu" in arguments.device else ["generic"])
    if arguments.wheel is not None:
        print(f"wrote {aot.build_wheel(specs, arguments.wheel, levels=levels)}")
        return
    entries = aot.build_directory(specs, arguments.out_dir, levels=levels)
    print(f"{len(entries)} modules in {arguments.out_dir}; use it with FI_BACKEND_AOT_DIR")


if __name__ == "__main__":
    sys.exit(main())
