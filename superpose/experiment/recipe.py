"""A recipe: one TOML file that says the whole run, as a set of dataclasses.

``[model]`` names a transformers architecture with its shape, or a path or id; ``[data]`` the prepared store;
``[superposition]`` the schedule; ``[training]`` the lengths, and anything `transformers.TrainingArguments` takes, by its own
name. A field that does not exist is refused by name, with the nearest one that does.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from superpose.engines.switch import RESETS
from superpose.errors import InputError
from superpose.schedule import Schedule, Stage

#: The losses of a bag (paper, loss).
LOSSES = ("mean", "sum-to-one")

#: TrainingArguments that follow from the recipe and are not set in it.
DERIVED = {
    "output_dir": "give --out",
    "max_steps": "give training.steps",
    "num_train_epochs": "give training.steps",
    "gradient_accumulation_steps": "it follows from training.sequences_per_step and per_device_train_batch_size",
    "train_sampling_strategy": "windows are read in order",
    "remove_unused_columns": "batches hold what the model takes",
    "seed": "give the recipe's own seed",
    "data_seed": "give the recipe's own seed",
    "label_smoothing_factor": "the multi-hot loss does not smooth",
    "auto_find_batch_size": "the batch is a function of the step",
    "resume_from_checkpoint": "give --resume",
}


@dataclass(frozen=True)
class ModelSection:
    """``architecture`` and its shape, or ``path``; other fields are those of the architecture's transformers config."""

    #: transformers model type, such as llama or qwen3_moe
    architecture: str | None = None
    #: a saved model's directory or a hub id, to continue its pre-training
    path: str | None = None
    #: fields of the transformers config; vocab_size follows the tokenizer unless given
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSection:
    #: directory made by `superpose prepare`
    path: str = ""
    #: tokens of one evaluation, a sample of the whole validation split
    evaluation_tokens: int = 2**20
    #: compare the store's checksums before training
    verify: bool = True


@dataclass(frozen=True)
class SuperpositionSection:
    """The schedule: bag size and step ratio, or ``stages``. Without it, or with bag_size = 1, training is ordinary."""

    bag_size: int = 1
    ratio: float = 0.0
    weighting: str | Sequence[float] = "uniform"
    loss: str = "mean"
    mode: str = "full"
    #: weights that those of the positions move to over the superposition phase
    final_weighting: str | Sequence[float] | None = None
    #: patch-level training's convention: a step's data tokens stay, and its positions fall to 1/bag_size
    divide_positions: bool = False
    #: explicit stages in order, each with bag_size and ratio (of all steps), and mode or weighting; the rest is plain
    stages: Sequence[dict[str, Any]] = ()
    #: what starts anew at a switch: reset-optimizer, restart-schedule, reinitialise; TST lets everything carry on
    at_switch: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingSection:
    """Lengths of the run; ``arguments`` are TrainingArguments by their own names."""

    #: optimizer steps
    steps: int = 0
    #: positions of a sequence, L
    positions: int = 0
    #: sequences of an optimizer step over all ranks and micro-batches
    sequences_per_step: int = 0
    #: share of the steps at the end over which the learning rate of the WSD schedule decays
    decay_ratio: float = 0.1
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleSection:
    """What is generated at the end of training."""

    prompts: Sequence[str] = ("",)
    max_new_tokens: int = 200
    temperature: float = 0.8


@dataclass(frozen=True)
class Recipe:
    name: str = "run"
    #: seeds the weights and the order of the windows
    seed: int = 0
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    superposition: SuperpositionSection = field(default_factory=SuperpositionSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    sample: SampleSection = field(default_factory=SampleSection)

    def schedule(self) -> Schedule:
        """The schedule of `superposition` over ``training.steps``. Raises InputError that names the field."""
        section, steps = self.superposition, self.training.steps
        common = {name: getattr(section, name) for name in ("mode", "weighting", "final_weighting")}
        with _naming("superposition"):
            if section.divide_positions:
                if section.stages or common != {"mode": "full", "weighting": "uniform", "final_weighting": None}:
                    raise ValueError("divide_positions takes bag_size and ratio alone")
                return Schedule.patch_level(steps, section.bag_size, section.ratio)
            if not section.stages:
                return Schedule.tst(steps, section.bag_size, section.ratio, **common)
            if (section.bag_size, section.ratio) != (1, 0.0):
                raise ValueError("stages take the place of bag_size and ratio: leave those two out (or set them to 1 and 0)")
            stages, end = [], 0.0
            for table in section.stages:
                table = {"ratio": 0.0, **common, **table}
                _known("superposition.stages", table, ["bag_size", "ratio", *common])
                start, end = end, end + table.pop("ratio")
                if not 0 <= start <= end <= 1 + 1e-9:
                    raise ValueError("ratios of the stages must be positive and add up to at most 1")
                stages.append(Stage(steps=round(end * steps) - round(start * steps), **table))
            return Schedule.staged([*stages, Stage(steps - round(end * steps))])

    def replace(self, section: str, **changes: Any) -> "Recipe":
        """A copy with fields of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **changes)})

    def as_dict(self) -> dict[str, Any]:
        """Plain values as in the TOML: fields that are None are left out, and pass-through fields stand in their section."""
        values = dataclasses.asdict(self)
        for section, name in (("model", "shape"), ("training", "arguments")):
            values[section] |= values[section].pop(name)
        return _plain(values)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.as_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Raises InputError for a field that does not exist, has the wrong type or cannot be used."""
        _known("", values, [f.name for f in dataclasses.fields(cls)])
        values = dict(values)
        if "model" in values:
            values["model"] = _with_rest("model", values["model"], ModelSection, "shape", _config_fields(values["model"]))
        if "training" in values:
            values["training"] = _with_rest("training", values["training"], TrainingSection, "arguments", _training_arguments())
        sections = {"data": DataSection, "superposition": SuperpositionSection, "sample": SampleSection}
        for name, section in sections.items():
            if name in values:
                values[name] = _build(name, section, values[name])
        recipe = _build("", cls, values)
        recipe._check()
        return recipe

    def _check(self) -> None:
        training = self.training
        for name in ("steps", "positions", "sequences_per_step"):
            if getattr(training, name) < 1:
                raise InputError(f"training.{name} must be at least 1, got {getattr(training, name)}")
        if not 0 <= training.decay_ratio <= 1:
            raise InputError(f"training.decay_ratio must lie in [0, 1], got {training.decay_ratio}")
        for name, remedy in DERIVED.items():
            if name in training.arguments:
                raise InputError(f"training.{name} is not set in a recipe: {remedy}")
        if bool(self.model.architecture) == bool(self.model.path):
            raise InputError("model needs either architecture (with its shape) or path")
        if self.superposition.loss not in LOSSES:
            raise InputError(f"superposition.loss {self.superposition.loss!r} is unknown: take one of {', '.join(LOSSES)}")
        for reset in self.superposition.at_switch:
            if reset not in RESETS:
                raise InputError(f"superposition.at_switch {reset!r} is unknown: take some of {', '.join(RESETS)}")
        schedule = self.schedule()
        with _naming("training"):
            for stage in schedule.stages:
                stage.positions(training.positions)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as ``training.steps=100``; values are TOML, anything else a string."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _override(values, override)
    return Recipe.from_dict(values)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.removeprefix("--").partition("=")
    if not separator or not key:
        raise InputError(f"{override!r} is not an override: write section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{key} is not a field: {section} is not a section")
    values[name] = value


class _naming:
    """Turns a ValueError of the library into an InputError that names the section."""

    def __init__(self, section: str) -> None:
        self.section = section

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError) and not isinstance(error, InputError):
            raise InputError(f"{self.section}: {error}") from None


def _known(section: str, values: dict[str, Any], names: Sequence[str]) -> None:
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(sorted(names)[:12])}"
            where = f"{section}.{name}" if section else name
            raise InputError(f"{where} is not a field of {f'[{section}]' if section else 'a recipe'}: {hint}")


def _with_rest(section: str, values: Any, kind: type, rest: str, names: Sequence[str]) -> Any:
    """Build a section of which all fields but its own are passed through under ``rest``."""
    if not isinstance(values, dict):
        raise InputError(f"{section} must be a table, [{section}]")
    own = [f.name for f in dataclasses.fields(kind) if f.name != rest]
    _known(section, values, [*own, *names])
    passed = {name: value for name, value in values.items() if name not in own}
    return _build(section, kind, {**{name: value for name, value in values.items() if name in own}, rest: passed})


def _build(section: str, kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{section} must be a table, [{section}]")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _known(section, values, [*fields])
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "str | None": str}
    for name, value in values.items():
        annotation = fields[name].type
        annotation = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        expected = kinds.get(annotation)
        wrong_bool = isinstance(value, bool) and expected is not bool
        if expected and value is not None and (wrong_bool or not isinstance(value, expected)):
            raise InputError(f"{section + '.' if section else ''}{name} must be a {annotation}, got {value!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _config_fields(values: Any) -> list[str]:
    from transformers import CONFIG_MAPPING

    architecture = values.get("architecture") if isinstance(values, dict) else None
    if architecture is None:
        return []
    if architecture not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(architecture), list(CONFIG_MAPPING.keys()), n=1)
        raise InputError(
            f"model.architecture {architecture!r} is not a transformers model type"
            + (f": did you mean {nearest[0]}?" if nearest else "")
        )
    config = CONFIG_MAPPING[architecture]
    return [*(f.name for f in dataclasses.fields(config)), *config.attribute_map]


def _training_arguments() -> list[str]:
    from transformers import TrainingArguments

    return [f.name for f in dataclasses.fields(TrainingArguments) if f.init]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
