"""The declarative plan of a distillation: a recipe is data, read from YAML and checked key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixers.errors import near
from recipes.errors import InvalidRecipeError, UnknownKeyError
from recipes.variants import find, lay_over, library

if TYPE_CHECKING:
    from torch import nn

    from recipes.explain import Explanation


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A mapping in the YAML; an unknown key is refused, with the names nearest to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    term: ClassVar[str] = "recipe"
    main_key: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if cls.main_key is not None and not isinstance(data, dict | BaseModel):
            data = {cls.main_key: data}
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise UnknownKeyError(
                    f"{cls.term} has no key {key!r}.{near(str(key), cls.model_fields)} "
                    f"Its keys: {', '.join(cls.model_fields)}."
                )
        return data


class TeacherSpec(Part):
    """Which model to distil; a bare string is its ``model``.

    Args:
        model: ``tiny-vlm``, ``smollm2-135m``, ``vlm-mini``, a folder, a ``.gguf`` file, or a name on the hub.
        dtype: Type of its weights, and of the student's that are not being trained.
        trust_remote_code: Whether code that comes with the model may run.
    """

    term: ClassVar[str] = "teacher"
    main_key: ClassVar[str] = "model"
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


class StudentSpec(Part):
    """What becomes of the teacher's attention; the arguments of ``bridges.replace_attention``.

    Args:
        mixer: A mixer's name, or layer pattern → mixer.
        layers: Layers that may be converted.
        init: Whether projections start as the teacher's or random.
        config: Fields of the mixer's config.
    """

    term: ClassVar[str] = "student"
    main_key: ClassVar[str] = "mixer"
    mixer: str | dict[str, str | dict[str, Any]] = "mmate"
    layers: str | int | list[int] = "all"
    init: Literal["attention", "random"] = "attention"
    config: dict[str, Any] = {}


class TaskSpec(Part):
    """A dataset, to train on or to be judged by; a bare string is the ``task``.

    Args:
        task: Its name: ``easy-vqa``, ``mix``, ``pictures``, ``recall`` or ``text``.
        options: Its keyword arguments.
        workers: Processes that make batches; 0 makes them in the process that runs the model.
    """

    term: ClassVar[str] = "data"
    main_key: ClassVar[str] = "task"
    task: str
    options: dict[str, Any] = {}
    workers: Annotated[int, Field(ge=0)] = 0


class Judge(TaskSpec):
    """What a student is judged by, beside its teacher; a bare string is the ``task``.

    Args:
        task: As for :class:`TaskSpec`.
        options: Likewise.
        workers: Likewise; where answers are generated.
        measures: ``accuracy`` of greedy answers, ``perplexity`` of the labelled tokens, ``agreement`` with the
            teacher's greedy continuations.
        limit: Items of the test split, spread evenly over it; null: all.
        batch_size: Items at a time.
        batch_tokens: Most tokens of prompts to answer at a time, where the dataset knows the sizes of its items: long
            videos and images can be asked about together. null: any number.
        name: What its rows and figures are called; null: as the task.
    """

    term: ClassVar[str] = "judged_by"
    name: str | None = None
    measures: Annotated[list[Literal["accuracy", "perplexity", "agreement"]], Field(min_length=1)] = [
        "accuracy"
    ]
    limit: Count | None = None
    batch_size: Count = 8
    batch_tokens: Count | None = None

    @property
    def label(self) -> str:
        """The name, or else the task's."""
        return self.name or self.task

    def arguments(self, measure: str) -> dict[str, Any]:
        """How many items a measure takes and how, as arguments of the function that takes it."""
        names = {"limit", "batch_size"} | ({"batch_tokens", "workers"} if measure == "accuracy" else set())
        return self.model_dump(include=names)


class Weighted(Part):
    """A loss; a bare number is its ``weight``."""

    main_key: ClassVar[str] = "weight"
    weight: Positive = 1.0


class HiddenStates(Weighted):
    """Alignment of hidden states: ‖student - teacher‖² / ‖teacher‖² over valid tokens, averaged over layers.

    Args:
        weight: Factor of this loss in the sum.
        form: ``injected``: each mixer gets the teacher's input, so layers learn independently.
            ``chained``: each gets what the student's layers before it made.
        at: What is compared: outputs of the ``attention`` modules, or of whole decoder ``layer``s
            (chained only).
        kinds: Whether text and vision tokens are averaged ``together``, or each kind ``apart`` and then the two of
            them: the text that reads a long video is a small part of its row.
    """

    term: ClassVar[str] = "hidden_states"
    form: Literal["injected", "chained"] = "injected"
    at: Literal["attention", "layer"] = "attention"
    kinds: Literal["together", "apart"] = "together"

    @model_validator(mode="after")
    def _check_form(self) -> HiddenStates:
        if self.form == "injected" and self.at == "layer":
            raise ValueError(
                "injected alignment compares attention outputs; write form: chained for at: layer"
            )
        return self


class AttentionWeights(Weighted):
    """Alignment of attention weights, KL(teacher ‖ student), on the teacher's input (Hedgehog, arXiv 2402.04347).

    A mixer's weights are those of all its branches, gate included. Text tokens' are compared: vision tokens of a
    student look both ways, and a teacher's do not.

    Args:
        weight: Factor of this loss in the sum.
        queries: Text tokens of a row, drawn at random for each batch, whose weights are compared. Memory grows
            with them: a few fp32 tensors of heads · queries · tokens a layer.
    """

    term: ClassVar[str] = "attention_weights"
    queries: Count = 32


class TokenKD(Weighted):
    """Token-level distillation: T²·KL(teacher ‖ student) of the next-token distributions.

    Args:
        weight: Factor of this loss in the sum.
        temperature: T, which divides both models' logits.
        tokens: Over the predictions of ``labelled`` tokens (the answers), or of all ``valid`` ones.
        chunk: Tokens whose full-vocabulary logits exist at a time; null: as many as make 512 MiB.
    """

    term: ClassVar[str] = "token_kd"
    temperature: Positive = 1.0
    tokens: Literal["labelled", "valid"] = "labelled"
    chunk: Count | None = None


class SequenceKD(Weighted):
    """Sequence-level distillation: cross-entropy on the answers that the teacher generates (greedily).

    Args:
        weight: Factor of this loss in the sum.
        samples: Training items that the teacher answers, once, before the stage.
    """

    term: ClassVar[str] = "sequence_kd"
    samples: Count = 1024


class TaskLoss(Weighted):
    """Cross-entropy on the dataset's own labels."""

    term: ClassVar[str] = "task"


class Losses(Part):
    """The losses of a stage; those that are absent are not computed."""

    term: ClassVar[str] = "losses"
    hidden_states: HiddenStates | None = None
    attention_weights: AttentionWeights | None = None
    token_kd: TokenKD | None = None
    sequence_kd: SequenceKD | None = None
    task: TaskLoss | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Losses:
        if not self.weights:
            raise ValueError(f"a stage needs a loss: one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def of_predictions(self) -> bool:
        """Whether a loss is about next tokens, and so needs the student's own stream and its output head."""
        return bool(self.weights.keys() - {"hidden_states", "attention_weights"})

    @property
    def weights(self) -> dict[str, float]:
        """Name → weight of the losses in use."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: loss.weight for name, loss in named.items() if loss is not None}


class LoRA(Part):
    """Low-rank adapters on frozen linear layers, merged into them at the end of the stage.

    Args:
        targets: Patterns, searched in the names of the student's linear layers.
        rank: Rank r.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the adapters' input.
    """

    term: ClassVar[str] = "lora"
    targets: Annotated[list[Pattern], Field(min_length=1)]
    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Optimizer(Part):
    """AdamW and its schedule. Weight decay spares vectors (norms, biases, decays).

    Args:
        learning_rate: Peak learning rate.
        factors: Pattern → factor on the learning rate of what is trained under a name that it is found in, such as new
            weights among a teacher's own; of several such patterns the last counts.
        weight_decay: Decoupled weight decay.
        warmup: Steps of linear warm-up, or, below 1, the fraction of the stage.
        schedule: Shape after the warm-up; ``linear`` and ``cosine`` end at 0.
        max_grad_norm: The gradient is clipped to this norm.
        betas: AdamW's decay rates.
    """

    term: ClassVar[str] = "optimizer"
    main_key: ClassVar[str] = "learning_rate"
    learning_rate: Positive
    factors: dict[Pattern, Positive] = {}
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0)] = 0.05
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    max_grad_norm: Positive = 1.0
    betas: tuple[float, float] = (0.9, 0.95)


class Stage(Part):
    """One stage of the training.

    Args:
        name: For folders and tables: lower case, digits, ``-``.
        trainable: Patterns, searched in parameter names; ``mixers`` stands for all parameters of the
            mixers. The rest is frozen.
        active: Branches of gated mixers that take part; null: all.
        lora: Adapters on what is frozen.
        losses: What is minimised.
        optimizer: How.
        steps: Optimiser steps.
        minutes: Train so long from the first step on, whatever ``steps`` says; the learning rate follows the time.
            null: as long as the steps take.
        data: Options of the dataset that differ from the recipe's in this stage, such as the lengths of its rows.
        batch_size: Rows of a forward pass on one device.
        batch_tokens: About how many tokens a forward pass has at most, so that of long rows there are fewer than
            ``batch_size``; needs a dataset that knows the sizes of its rows. null: as many as those rows have.
        gradient_accumulation: Forward passes of an optimiser step.
        gradient_checkpointing: Whether to recompute layers in the backward pass, to save memory.
        max_length: Rows longer than this many tokens are cut at their end.
        save_every: Steps between checkpoints; null: only the stage's result is kept.
        log_every: Steps between log entries.
    """

    term: ClassVar[str] = "stage"
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    trainable: list[Pattern] = []
    active: Annotated[list[str], Field(min_length=1)] | None = None
    lora: LoRA | None = None
    losses: Losses
    optimizer: Optimizer
    data: dict[str, Any] = {}
    steps: Count
    minutes: Positive | None = None
    batch_size: Count = 8
    batch_tokens: Count | None = None
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    max_length: Count | None = None
    save_every: Count | None = None
    log_every: Count = 10

    @model_validator(mode="after")
    def _check_trains(self) -> Stage:
        if not self.trainable and self.lora is None:
            raise ValueError(f"stage {self.name!r} trains nothing; give it trainable patterns or lora")
        return self


class Recipe(Part):
    """A whole distillation.

    Args:
        name: For folders and tables.
        description: What it is for, in a sentence.
        seed: Of new weights, data order and dropout.
        teacher: Which model.
        student: What becomes of its attention.
        data: What to train on.
        stages: One after the other.
        judged_by: What ``linmu evaluate --report`` measures; empty: accuracy on the test split of ``data``.
    """

    term: ClassVar[str] = "the recipe"
    name: str
    description: str = ""
    seed: int = 0
    teacher: TeacherSpec
    student: StudentSpec
    data: TaskSpec
    stages: Annotated[list[Stage], Field(min_length=1)]
    judged_by: list[Judge] = []

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, found {names}")
        measured = [f"{judge.label}: {measure}" for judge in self.judged_by for measure in judge.measures]
        if len(set(measured)) < len(measured):
            raise ValueError(f"what is judged twice must have different names, found {measured}")
        return self

    @classmethod
    def names(cls) -> list[str]:
        """List the recipes of the library, sorted, the ablations after the others."""
        return list(library())

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a recipe from the library by its name, or from a YAML file.

        A file whose ``base`` names another recipe, or a file beside it, is laid over that one; see
        :func:`recipes.variants.lay_over`.

        Raises:
            UnknownRecipeError: There is no such recipe or file, or no such base; near names are listed.
            UnknownKeyError: A key does not exist.
            InvalidRecipeError: It is not YAML, or a value is missing, of a wrong type or out of range; or its
                bases lead back to it.
        """
        return cls._load(find(name_or_path), ())

    @classmethod
    def _load(cls, path: Path, above: tuple[Path, ...]) -> Recipe:
        chain = (*above, path.resolve())
        if chain[-1] in above:
            raise InvalidRecipeError(f"bases lead in a circle: {' → '.join(p.stem for p in chain)}.")
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidRecipeError(f"{path} is not YAML: {error}") from error
        return cls._build(fields, str(path), path.parent, chain)

    @classmethod
    def from_dict(cls, fields: Any, source: str = "the recipe") -> Recipe:
        """Build a recipe from plain data; the inverse of :meth:`to_dict`.

        Args:
            fields: A mapping; its ``base``, if it has one, is a name of the library or a file.
            source: What to call it in an error.

        Raises:
            UnknownRecipeError: Its base does not exist; near names are listed.
            UnknownKeyError: A key does not exist.
            InvalidRecipeError: A value is missing, of a wrong type or out of range.
        """
        return cls._build(fields, source, None, ())

    @classmethod
    def _build(cls, fields: Any, source: str, beside: Path | None, chain: tuple[Path, ...]) -> Recipe:
        if not isinstance(fields, dict):
            raise InvalidRecipeError(f"{source} must be a mapping of keys, found {type(fields).__name__}.")
        if "base" in fields:
            base, changes = fields["base"], {key: value for key, value in fields.items() if key != "base"}
            if not isinstance(base, str):
                raise InvalidRecipeError(f"{source}: base must be the name of a recipe, found {base!r}.")
            fields = lay_over(cls._load(find(base, beside), chain).to_dict(), changes, source)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            wrong = [f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
            raise InvalidRecipeError("\n".join([f"{source} is not a valid recipe:", *wrong])) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON and YAML can hold."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML, defaults written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def explain(self, model: nn.Module) -> Explanation:
        """Say what each stage trains and checks, with counts; ``print`` the result.

        Args:
            model: The teacher, or a student converted already. It is not changed.

        Raises:
            RecipeError: A pattern, branch or loss does not fit the model.
            bridges.BridgeError: The model cannot be converted as the recipe says.
            mixers.MixerError: The mixer or its settings are unknown.
        """
        from recipes.explain import explain

        return explain(self, model)
