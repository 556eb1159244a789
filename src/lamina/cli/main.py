"""`lamina`: the commands, and the one place where an error becomes a message and an exit code.

Exit codes: 0 done; 1 the input can't be used; 2 wrong usage; 70 a mistake of ours; 130 interrupted.

Nothing heavy is imported until a command's own function runs, so that every `--help` is instant.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lamina import __version__
from lamina.cli import data, recipes, store
from lamina.cli.chat import chat
from lamina.cli.doctor import doctor
from lamina.cli.eval import evaluate
from lamina.cli.generate import generate
from lamina.cli.plan import plan
from lamina.cli.prepare import prepare
from lamina.cli.quiet import debugging, quiet
from lamina.cli.terminal import note, show_error
from lamina.cli.tune import tune
from lamina.errors import LaminaError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="lamina",
    help="LoRA for mixture-of-experts models that don't fit the memory at hand.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it starts twice as fast, and reads well in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor)
app.add_typer(recipes.app, name="recipes")
app.command()(plan)
app.command()(prepare)
app.add_typer(store.app, name="store")
app.add_typer(data.app, name="data")
app.command()(tune)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)

#: What the operating system refuses and a user can mend.
_THE_MACHINE_SAYS_NO = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def _lamina(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; those of the process, if None.

    Returns:
        the exit code.
    """
    quiet()
    try:
        result = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except LaminaError as error:
        show_error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except BrokenPipeError:
        # Whoever read our output has had enough (`| head`). Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _THE_MACHINE_SAYS_NO:
            return _our_mistake(error)
        where = f"{error.filename}: " if error.filename else ""
        show_error(LaminaError(f"{where}{error.strerror}"))
        return 1
    except Exception as error:
        return _our_mistake(error)
    if result == 130:
        note("interrupted")
    return result


def _run(argv: list[str]) -> int:
    """
    Raises:
        UsageError: there is no such command or option, or it can't have such a value.
    """
    command: Any = typer.main.get_command(app)
    try:
        result = command.main(args=argv, prog_name="lamina", standalone_mode=False)
    except Exception as error:
        # typer has carried click's exceptions inside itself for some time, and before that raised
        # click's own: a family known by what it can do.
        if not hasattr(error, "format_message") or not hasattr(error, "ctx"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            note(error.format_message())
            return 2
        where = error.ctx.command_path if error.ctx else "lamina"
        raise UsageError(
            error.format_message(), hint=f"`{where} --help` shows what it takes."
        ) from None
    return result if isinstance(result, int) else 0


def _our_mistake(error: Exception) -> int:
    """Own up, and keep what is needed to find the reason."""
    text = "".join(traceback.format_exception(error))
    if debugging():
        sys.stderr.write(text)
    with tempfile.NamedTemporaryFile(
        "w", prefix="lamina-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"lamina {__version__}, Python {sys.version}\n{sys.argv}\n\n{text}")
    show_error(
        LaminaError(
            f"this is a mistake in Lamina, not yours: {type(error).__name__}: {error}",
            hint=f"Please report it with {file.name}, which says where it happened.",
        )
    )
    return 70
