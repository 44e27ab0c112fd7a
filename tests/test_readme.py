"""README.md agrees with the program. `python tests/test_readme.py` writes the table of flags into it anew."""

import re
from pathlib import Path

import train_dreambooth_lora_z_image as trainer


README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- flags -->\n", "<!-- /flags -->\n"


def flags_table():
    """The parser's groups as Markdown tables."""
    lines = []
    for group in trainer.build_parser()._action_groups[2:]:
        lines += [f"**{group.title}**", "", "| flag | meaning |", "|---|---|"]
        for action in group._group_actions:
            meaning = (
                action.help % {"default": action.default, "choices": ", ".join(map(str, action.choices or []))}
            ).replace("|", "\\|")
            metavar = f" {action.metavar or ''}".rstrip() if action.nargs != 0 else ""
            if action.choices and not action.metavar:
                metavar = " {" + ",".join(action.choices) + "}"
            lines.append(f"| `{action.option_strings[0]}{metavar}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def split(text):
    """README's text before, inside and after the table of flags."""
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


def test_the_table_of_flags_is_the_parsers():
    assert split(README.read_text(encoding="utf-8"))[1] == flags_table()


def test_every_flag_that_the_readme_names_exists():
    known = {option for action in trainer.build_parser()._actions for option in action.option_strings}
    known |= {"--config_file", "--logdir", "--kills"}  # of accelerate, of tensorboard, of tests/kill_test.py
    known |= {
        "--folder",
        "--build_only",
        "--pictures",
        "--steps",
        "--flags",
        "--float32_products",
        "--script",
    }  # benchmarks
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]+", README.read_text(encoding="utf-8")))
    assert named <= known


def test_every_file_that_the_readme_names_exists():
    names = re.findall(r"(?:configs|tests)/[\w./-]+\w", README.read_text(encoding="utf-8"))
    missing = [name for name in names if not (README.parent / name).exists()]
    assert len(names) > 10 and not missing


if __name__ == "__main__":
    before, _, after = split(README.read_text(encoding="utf-8"))
    README.write_text(before + BEGIN + flags_table() + END + after, encoding="utf-8")
