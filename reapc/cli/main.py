"""The ``reapc`` command: one file per subcommand, imported when it is asked for."""

from __future__ import annotations

import importlib
import logging
import sys

import click

from reapc import __version__
from reapc.errors import ReapcError

COMMANDS = {
    "build": "Compile a recipe: decide, observe, prune, quantize, verify, and write the server's script.",
    "fit": "Show which models fit a hardware budget, pruned and quantized how.",
    "plan": "Show what a build of a recipe would decide, and why.",
    "rehearse": "Try a recipe without its weights, on a tiny random model with the same structure.",
    "inspect": "Show a model in numbers: parameters by part, weights in any format, KV cache.",
    "corpora": "List the calibration mixes; pack one into token ids.",
    "observe": "Record expert scores of a model over calibration text.",
    "scores": "Show, merge and mix scores files; how far the choice of experts depends on the data.",
    "allocate": "Choose the number of experts and every tensor's GGUF type together, under a budget.",
    "prune": "Drop the experts with the lowest scores from a checkpoint.",
    "heal": "Refit the experts of a pruned checkpoint to its original.",
    "quantize": "Write a checkpoint as a quantized GGUF file.",
    "compare": "Show two builds side by side, or measure what one model lost against another.",
    "report": "Write the page of a build again.",
    "sweep": "Measure KL against bytes: pruned and quantized in every way at equal bytes.",
    "serve": "Start the server of a build, watch it, and record the memory that it took.",
    "verify": "Check a build's files, or a running server against the build's reference.",
    "eval": "Run lm-eval against a running server, or print the commands of other benchmarks.",
    "formats": "List the weight formats: bits per weight, engines, minimum capability.",
    "targets": "List the hardware targets that reapc knows; calibrate one from what servers took.",
    "doctor": "Check the external tools, and install llama.cpp's.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"reapc.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from reapc.schema import nearest

            ctx.fail(f"no command {args[0]!r}. {nearest(args[0], COMMANDS)}Known: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reapc")
def cli() -> None:
    """A deployment compiler for Mixture-of-Experts language models."""


# GPTQModel brings torchao, transformers imports it where it is, and it complains of kernels that nothing here uses.
_NOISY = ("torchao", "torch.utils._pytree")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; exit code 0, 1 (it cannot be done) or 2 (the request is wrong)."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = cli.main(args=arguments, prog_name="reapc", standalone_mode=False)
    except ReapcError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except OSError as error:
        click.echo(f"error: {error.filename or ''}: {error.strerror or error}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
