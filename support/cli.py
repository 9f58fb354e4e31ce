"""The command line, made from a dataclass whose source says everything: groups, help, and which command reads what.

In the class body a comment "# [train sample] Heading" begins a group that these commands read; what stands behind a
field's default, and on comment lines below it, is its help. tyro parses and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import typing

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


def check_ranges(settings: dict, may_be_zero: set[str], at_most: dict[str, float]) -> None:
    """Raise UserError for a number that is not above zero (or negative, where zero is allowed), or too large."""
    for name, value in settings.items():
        if type(value) not in (int, float):
            continue
        if not (value >= 0 if name in may_be_zero else value > 0):
            wanted = "must not be negative" if name in may_be_zero else "must be above zero"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it {wanted}")
        if not value <= at_most.get(name, 1e30):
            raise UserError(f"--{name.replace('_', '-')} is {value}; at most {at_most.get(name, 1e30)} works")
