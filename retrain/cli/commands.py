"""The commands and what each takes besides the config's keys. One table: dispatch, help and documentation go by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A flag of a command that is no key of the config. metavar: what its value is; empty for a switch."""

    flag: str
    help: str
    metavar: str = ""

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")


@dataclass(frozen=True)
class Command:
    """usage: what follows the command's name. config_flags: whether any key of the config can be given as a flag."""

    name: str
    usage: str
    summary: str
    options: tuple[Option, ...] = ()
    config_flags: bool = True
    positionals: int = 1

    @property
    def module(self) -> str:
        return f"retrain.cli.{self.name}"

    @property
    def spoken(self) -> str:
        """How it is called: training has no word of its own."""
        return "retrain" if self.name == "train" else f"retrain {self.name}"


JSON = Option("--json", "Print one JSON object instead of text.")

TRAIN = Command(
    "train",
    "[CONFIG.toml] [--nproc N] [--campaign-dir DIR] [--flag value ...]",
    "Train. Without CONFIG, ./retrain.toml. A file with [campaign] runs a campaign.",
    (
        Option(
            "--nproc", "Processes of this machine that train together, each on its own GPU, or all on the CPU.", "N"
        ),
        Option(
            "--campaign-dir",
            "Folder of the campaign, and of one to go on with (default: a new folder in log_dir).",
            "DIR",
        ),
    ),
)

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "squeeze",
            "ADAPTER_DIR or CONFIG.toml [--target-ranks 4,8] [--output-path DIR] [--eval CONFIG.toml] [--json]",
            "Analyse the ranks of an adapter, and compress it when given an output path.",
            (
                Option("--eval", "Config on whose held-out examples both adapters are compared.", "CONFIG.toml"),
                JSON,
            ),
        ),
        Command(
            "explain",
            "CONFIG.toml [--nproc N] [--flag value ...] [--json]",
            "Dry run: the resolved config, what has no effect, the runs of a campaign, memory. Loads no model.",
            (Option("--nproc", "Memory where so many processes train together, each on a device.", "N"), JSON),
        ),
        Command(
            "status",
            "LOG_DIR [--watch] [--json]",
            "Runs and campaigns below a folder: step, rates, last checkpoint, whether alive.",
            (Option("--watch", "Go on showing them, every two seconds, until q is pressed."), JSON),
            config_flags=False,
        ),
        Command(
            "report",
            "LOG_DIR [-o FILE.html]",
            "Write one self-contained page about a run or a campaign.",
            (Option("-o", "File to write (default: report.html in LOG_DIR).", "FILE"),),
            config_flags=False,
        ),
        Command(
            "eval",
            "CONFIG.toml [--adapter DIR] [--flag value ...] [--json]",
            "pass@1 and pass@k with intervals on held-out examples.",
            (Option("--adapter", "Adapter to evaluate. Without it, the base model.", "DIR"), JSON),
        ),
        Command(
            "serve",
            "CONFIG.toml [--print] [--train] [--program FILE] [--flag value ...]",
            "Start the inference server that a config samples from, and stop it at the end.",
            (
                Option("--print", "Only print the command that would start it."),
                Option("--train", "Train against it, and stop it when the run ends."),
                Option("--program", "The server's program, where it is not on PATH.", "FILE"),
            ),
        ),
        Command(
            "planning",
            "TEXT or FILE or mine LOG_DIR [--config CONFIG.toml] [--flag value ...] [--json]",
            "Show which tokens of a text plan. `mine` finds phrases for strategic_grams in what a run solved.",
            (
                Option(
                    "--config", "Config whose tokenizer and detector count (default: builtin:tiny's).", "CONFIG.toml"
                ),
                Option("--top", "With `mine`: most phrases to show (default: 20).", "N"),
                JSON,
            ),
            positionals=2,
        ),
        Command(
            "doctor",
            "[CONFIG.toml] [--flag value ...] [--json]",
            "What this machine has and lacks for a config, and the command that would fix it.",
            (JSON,),
        ),
        Command(
            "init",
            "[--template NAME] [PATH]",
            "Write a commented config: quickstart, gpu, server, tinker, campaign or squeeze.",
            (Option("--template", "Which config to write (default: quickstart).", "NAME"),),
            config_flags=False,
        ),
        Command("schema", "", "Print the JSON Schema of the config, for editors.", config_flags=False, positionals=0),
    )
}

EVERYWHERE = (
    Option("--help", "Show this help."),
    Option("--version", "Show the version."),
    Option("--debug", "Show the traceback of an error."),
)


def command(name: str) -> Command:
    """The entry of a command; training is "train"."""
    return TRAIN if name == TRAIN.name else COMMANDS[name]
