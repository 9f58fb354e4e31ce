"""The command line, made from a dataclass whose source says everything: groups, help, and which command reads what.

In the class body a comment "# [train sample] Heading" begins a group that these commands read; what stands behind a
field's default, and on comment lines below it, is its help. tyro parses and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Callable

import torch

from support import UserError


class Group(typing.NamedTuple):
    heading: str
    commands: list[str]
    helps: dict[str, str]       # by field


def groups(config_class: type) -> list[Group]:
    """The groups of the dataclass, read from its source."""
    found: list[Group] = []
    field = None
    for line in inspect.getsource(config_class).splitlines():
        if match := re.match(r"\s+# \[([\w ]+)\] (.+)", line):
            found.append(Group(match[2], match[1].split(), {}))
        elif match := re.match(r"\s+(\w+): .*?  # (.+)", line):
            field = match[1]
            found[-1].helps[field] = match[2]
        elif field and (match := re.match(r"\s+#\s+(.+)", line)):
            found[-1].helps[field] += " " + match[1]
    return found


def parse(config_class: type, command: str, arguments: list[str], default: object | None = None) -> object:
    """An instance of the dataclass from what was typed after `command`; `default` has the values of what was not.

    Raises UserError, in one sentence, for a mistake; --help prints the groups that the command reads, and exits.
    """
    import tyro
    hints, default = typing.get_type_hints(config_class), default or config_class()
    mine = [group for group in groups(config_class) if command in group.commands]
    for group in groups(config_class):                          # tyro would guess at a similar name
        for name in group.helps if command not in group.commands else ():
            option = f"--{name.replace('_', '-')}"
            if any(argument.split("=")[0].replace("_", "-") in (option, "--no-" + option[2:]) for argument in arguments):
                raise UserError(f"{option} is not for {command}; leave it out")
    parts = []
    for number, group in enumerate(mine):
        fields = [(name, typing.Annotated[hints[name], tyro.conf.arg(
            help=text, help_behavior_hint="" if getattr(default, name) is None else None)],
            dataclasses.field(default=getattr(default, name))) for name, text in group.helps.items()]
        part = dataclasses.make_dataclass(f"Group{number}", fields)
        title = re.sub(r"\W+", "_", group.heading.lower())
        parts.append((title, part, dataclasses.field(default_factory=part)))
    commands = ", ".join(dict.fromkeys(name for group in groups(config_class) for name in group.commands))
    about = (f"{config_class.__doc__} Commands: {commands}; each has its own --help, and train may be left out. An option "
             "without a default here gets one that depends on the base, the recipe and the reward.")
    options = tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Options", parts)]
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            given = tyro.cli(options, prog=f"python r2d3.py {command}", args=arguments, description=about)
    except SystemExit as stop:
        if stop.code == 0:                                      # --help
            raise
        text = message.getvalue().partition("\n")[2]            # without the title, then without the box
        text = re.split("Argument helptext|For full helptext", re.sub("[│─╰╯]|-{4,}", " ", text))[0]
        raise UserError(" ".join(text.split()).rstrip(".") + f"; python r2d3.py {command} --help lists what there is") from None
    values = {name: value for part in vars(given).values() for name, value in vars(part).items()}
    return dataclasses.replace(default, **values)


def check_types(config_class: type, settings: dict) -> tuple[list[str], str | None]:
    """Names in `settings` that are no fields, and in words the first value that is not of its field's type, or None."""
    hints = typing.get_type_hints(config_class)
    for name, value in settings.items():
        choices, kinds = [], []
        for hint in typing.get_args(hints.get(name)) or [hints.get(name)]:
            choices += typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else []
            kinds += [hint] if isinstance(hint, type) else []
        if typing.get_origin(hints.get(name)) is typing.Literal:
            choices, kinds = typing.get_args(hints[name]), []
        kinds += [int] if float in kinds else []
        if name in hints and value not in choices and type(value) not in kinds:
            return [], f"{name} is {value!r}, wanted {' or '.join(map(repr, choices)) or kinds[0].__name__}"
    return sorted(settings.keys() - hints.keys()), None


MAY_BE_ZERO = {"reg_weight", "elevation_jitter", "azimuth_jitter", "seed", "skip_below", "min_quantile"}
AT_MOST = {"steps": 500, "lora_rank": 1024, "seed": 2**62, "skip_below": 1, "fraction": 1, "min_quantile": 0.9,
           "elevation_jitter": 80, "azimuth_jitter": 180}


def check(config) -> None:
    """Raise UserError if a setting of r2d3.Config is out of range, or cannot be used on this machine."""
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        option, most = f"--{name.replace('_', '-')}", AT_MOST.get(name, 1e30)
        if not (value >= 0 if name in MAY_BE_ZERO else value > 0):
            raise UserError(f"{option} is {value}; it must {'not be negative' if name in MAY_BE_ZERO else 'be above zero'}")
        if not value <= most:
            raise UserError(f"{option} is {value}; at most {most} works")
    if config.draft_steps > config.steps:
        raise UserError(f"--draft-steps is {config.draft_steps}; the sampler has {config.steps} --steps")
    if config.view_size < 8:
        raise UserError("--view-size must be at least 8 pixels")
    if config.protocol and config.samples_per_prompt < 2:
        raise UserError("--protocol paper compares distributions; use --samples-per-prompt 2 or more")
    if isinstance(config.beta, str) and not re.fullmatch(r"(?=.*[1-9])\d*\.?\d+sd", config.beta):
        raise UserError(f"--beta is {config.beta}; write a number, or one with sd, such as 2sd")
    try:
        torch.empty(0, device=config.device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device} cannot be used here ({str(error).splitlines()[0][:80]})") from None
    on_cpu = torch.device(config.device).type == "cpu"
    if config.backend == "triton" and on_cpu and not os.environ.get("TRITON_INTERPRET"):
        raise UserError("--backend triton needs a GPU; on a CPU leave --backend out")


def check_steps(config, schedule, picked: list[int]) -> None:
    """Raise UserError if none of the sampler's steps can be trained; `picked` are those that one trajectory trains."""
    trained = torch.arange(config.steps - (config.last_step == "never"))
    if config.method in ("nabla", "ddpo") and not schedule.step(trained)[2].all():
        raise UserError("a step that draws no noise cannot be trained: a rectified flow's last one (give --last-step never) "
                        "and all of --sampler euler (train with dpm, sample with euler)")
    without_reward = config.method == "nabla" and config.skip_below and picked == [config.steps - 1]
    if not picked or without_reward:
        raise UserError(f"with --steps {config.steps} no step of the sampler is trained on the reward; use --steps "
                        f"{math.ceil(2 / config.fraction)} or more, or a larger --fraction")


class Stream:
    """A stream whose reader may leave, as in `| head`: then it says nothing more, and the work goes on."""

    def __init__(self, stream: typing.TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable, *arguments: str) -> None:
        try:
            act(*arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def exit_code(work: Callable[[], None]) -> int:
    """Do the work, and say in one sentence what stopped it. Returns 0 done, 2 the caller can mend it, 130 stopped.

    SIGTERM, which schedulers send, stops like Ctrl-C. What the terminal has no letters for is printed as "?".
    """
    with contextlib.suppress(ValueError):                       # not the main thread: signals are the caller's
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = map(Stream, before)
    code, said = 0, ""
    try:
        work()
    except UserError as error:
        code, said = 2, str(error)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        code, said = 2, f"{error.strerror or error}{place}"
    except torch.OutOfMemoryError:
        code, said = 2, "out of memory; try a smaller --micro-batch or --eval-batch, or --checkpoint"
    except KeyboardInterrupt as error:
        code, said = 130, "stopped" + (f"; {error}" if error.args else "; what was written is whole")
    finally:
        if said:
            print(f"\nr2d3: {said}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
    return code
