"""Settings of a recipe that say how students are taught: training, signals, loss.

`recipe` has the rest. No import of torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Spec(BaseModel):
    """Frozen, and nothing unknown gets in."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"{value} is not allowed: here true and false mean nothing")
        return value


class LoraSpec(Spec):
    """Low-rank adapters learn and the model's own weights rest: less memory, less to compute."""

    rank: int = Field(16, ge=1, le=1024)
    """Of a matrix's change."""
    alpha: int = Field(32, ge=1)
    """The change is multiplied by alpha / rank."""


class TrainingSpec(Spec):
    """One training run: AdamW, linear warm-up, linear decay to zero."""

    epochs: float = Field(gt=0, le=1000)
    """Passes over the training rows; fractions are allowed."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimizer step, over all devices and micro-batches."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's; never on biases and norms."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer further from the output learns this much slower; 1 is no difference."""
    head_factor: float = Field(1.0, gt=0, le=100)
    """What stands behind the last layer learns this much faster."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """This share of each hard label is spread over all classes."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this global norm."""
    micro_batch: int | None = Field(None, ge=1)
    """Forward at most this many examples at a time, to save memory. The step stays the same."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of the forward's matrix products. Weights, losses and the optimizer's state stay fp32.
    `auto`: bf16 for texts where the machine multiplies it faster, measured as a run begins."""
    lora: LoraSpec | None = None
    """Train adapters (`lora: {}`), which are merged at the end (extra 'lora'). Default: all weights
    learn."""
    backend: Literal["auto", "dense", "fused"] = "auto"
    """`fused` never makes all logits: head and loss go in chunks of positions. `auto`: where the
    logits of a forward would take more than 48 MiB."""


class DenseSpec(Spec):
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of a stored logit."""


class TopKSpec(Spec):
    k: int = Field(32, ge=1)
    """How many of the largest logits are stored."""
    values: Literal["fp16", "bf16", "int8"] = "fp16"
    """How a logit is stored."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = None
    """For which the mass outside of the k is stored. Default: `distill.temperature` alone."""


class SampledSpec(Spec):
    n: int = Field(24, ge=1, lt=2**16)
    """How many different ids are drawn at a position."""
    draws: Literal["distinct", "systematic", "independent"] = "distinct"
    """How. `distinct` has the least variance; `independent` is the paper's."""
    importance_temperature: float = Field(1.0, gt=0, le=2)
    """Ids are drawn by p to this power; 1 is best but for experiments."""


class SignalsSpec(Spec):
    """How the teacher's answers are stored; one of dense, topk and sampled, or none of them:
    every logit for up to 4,096 classes, a sample for more."""

    dense: DenseSpec | None = None
    """Every logit. Serves any temperature."""
    topk: TopKSpec | None = None
    """The largest logits, and how much mass the others have: a biased target, in few bytes."""
    sampled: SampledSpec | None = None
    """A random sample whose gradient is right in expectation, in fewer bytes. Serves one
    temperature."""
    max_gb: float | None = Field(None, gt=0)
    """Choose the codec of least error that takes at most this many 10^9 bytes."""

    @model_validator(mode="after")
    def _one_at_most(self) -> Self:
        given = [n for n in ("dense", "topk", "sampled", "max_gb") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}`: at most one of them")
        return self


Softness = Annotated[float, Field(gt=0, le=100)]


class TemperatureSpec(Spec):
    """A number, `auto`, `{start: 4, end: 1}`, `{entropy: 0.5}`, or `{candidates: [1, 4]}`."""

    fixed: Softness | None = None
    """The same for every example and step."""
    start: Softness | None = None
    """At the first step, with equal steps to `end`."""
    end: Softness | None = None
    """At the last step."""
    entropy: float | None = Field(None, gt=0, lt=1)
    """For each example that at which the teacher's entropy is this share of the largest."""
    candidates: tuple[Softness, ...] | None = Field(None, min_length=2)
    """Short trainings with each of them; the one with the least loss on the validation rows is
    taken. `auto` is 1, 2, 4 and 8."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        if value == "auto":
            return {"candidates": (1.0, 2.0, 4.0, 8.0)}
        return {"fixed": value} if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        kinds = [self.fixed, self.start, self.entropy, self.candidates]
        if sum(kind is not None for kind in kinds) != 1 or (self.start is None) != (
            self.end is None
        ):
            raise ValueError(
                "not one temperature: a number, auto, start with end, entropy, or candidates"
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        number = {"type": "number", "exclusiveMinimum": 0, "maximum": 100}
        return {"anyOf": [number, {"const": "auto"}, {**schema}]}


# Settings that only one divergence has.
_OWN = {
    "alpha": ("skew_kl", "skew_reverse_kl"), "beta": ("jsd",), "head_mass": ("akl",),
    "target_weight": ("dkd",), "non_target_weight": ("dkd",), "inter_weight": ("dist",),
    "intra_weight": ("dist",), "top_k": ("ranking",),
}  # fmt: skip


class DivergenceSpec(Spec):
    """A name, or a name with its own settings. Formulas and papers: `docs/losses.md`."""

    kind: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "akl", "dkd",
        "dist", "ranking", "uld",
    ] = "forward_kl"  # fmt: skip
    """How the student's distribution is held against the teacher's. `uld` is for students cut from
    a `base.model` with another tokenizer (language-modeling); the teacher is asked as it goes."""
    alpha: float | None = Field(None, gt=0, lt=1)
    """skew_kl, skew_reverse_kl: share of the first in the mixture. Default 0.1."""
    beta: float | None = Field(None, gt=0, lt=1)
    """jsd: the teacher's share in the mixture. Default 0.5."""
    head_mass: float | None = Field(None, gt=0, lt=1)
    """akl: mass of the teacher's head. Default 0.5."""
    target_weight: float | None = Field(None, ge=0)
    """dkd: of the label against all else. Default 1."""
    non_target_weight: float | None = Field(None, ge=0)
    """dkd: of the others among themselves. Default 8."""
    inter_weight: float | None = Field(None, ge=0)
    """dist: of the relation between classes. Default 1."""
    intra_weight: float | None = Field(None, ge=0)
    """dist: of the relation within a class. Default 1."""
    top_k: int | None = Field(None, ge=2)
    """ranking: classes that are ranked. Default 8."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name in self.settings():
            if self.kind not in _OWN[name]:
                raise ValueError(f"`{name}` has no effect with {self.kind}: {_OWN[name][0]} has it")
        return self

    def settings(self) -> dict[str, Any]:
        """The divergence's own, those that were given."""
        return self.model_dump(exclude={"kind"}, exclude_none=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        kinds = schema["properties"]["kind"]["enum"]
        return {"anyOf": [{"enum": kinds}, {**schema}]}


Layer = int | Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$")]


class HiddenSpec(Spec):
    """Hidden states of student and teacher, token by token; of images in each quarter. Projectors
    are trained with the student and not saved in it."""

    loss: Literal["mse", "cosine", "relation", "cka"] = "cosine"
    """`mse` and `cosine` behind a projector where the widths differ; `relation`: MiniLM's, between
    the tokens of an example; `cka`: between the tokens of a batch."""
    weight: float = Field(1.0, gt=0)
    """Factor of the loss, as given."""
    layers: Literal["auto", "last", "uniform"] | tuple[tuple[Layer, Layer], ...] = "auto"
    """Which learns from which. `auto`: those most alike (CKA) before the training, in order;
    `last`: the last from the last; `uniform`: at equal steps. Or pairs of the student's and the
    teacher's: 1 is the first layer's output, 0 what it gets; or paths of modules."""
    relation_heads: int | None = Field(None, ge=1)
    """relation: into how many parts a state is split. Default: the most up to 12 that divide both
    widths."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of a stored number."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.relation_heads is not None and self.loss != "relation":
            raise ValueError(f"`relation_heads` has no effect with {self.loss}: relation has it")
        if not self.layers:
            raise ValueError("`layers` is empty: one pair or more, or auto")
        return self

    def settings(self) -> dict[str, Any]:
        return self.model_dump(include={"relation_heads"}, exclude_none=True)


class EmbeddingSpec(Spec):
    """The mean of an example's last hidden states, student's and teacher's."""

    loss: Literal[
        "mse", "cosine", "similarity_kl", "rkd_distance", "rkd_angle", "cka"
    ] = "cosine"  # fmt: skip
    """`mse` and `cosine` behind a projector where the widths differ; the others compare the
    examples of a batch with each other."""
    weight: float = Field(1.0, gt=0)
    """Factor of the loss, as given."""
    temperature: float | None = Field(None, gt=0)
    """similarity_kl: of the similarities. Default 0.1."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of a stored number."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.temperature is not None and self.loss != "similarity_kl":
            raise ValueError(f"`temperature` has no effect with {self.loss}: similarity_kl has it")
        return self

    def settings(self) -> dict[str, Any]:
        return self.model_dump(include={"temperature"}, exclude_none=True)


_NOT_OWN = {  # divergences that a student's own texts cannot be taught with
    "dkd": "dkd is about the label, and these texts have none",
    "uld": "uld is for another tokenizer, in which these texts are not written",
}


class OnPolicySpec(Spec):
    """language-modeling: some steps are on texts that the student writes itself, from the training
    rows' prompts, and the teacher scores token by token (GKD). The divergence alone counts there,
    not what is said of hard labels, hidden states and embeddings."""

    share: float = Field(0.25, gt=0, le=1)
    """Of the optimizer steps, those behind `after`."""
    after: float = Field(0.0, ge=0, lt=1)
    """None before this share of the training is done: an untaught student writes nonsense."""
    max_new_tokens: int = Field(64, ge=1)
    """Of a text, if it does not come to its end before."""
    prompt_tokens: int = Field(16, ge=1)
    """Where all of a document counts: so many of its first tokens are the prompt. Elsewhere it is
    what stands before an answer."""
    sampling_temperature: float = Field(1.0, ge=0, le=100)
    """Of the draws; 0 is the likeliest token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum."""
    batches: int = Field(4, ge=1)
    """Texts are written for so many steps at a time: more are faster, and older when learnt."""
    reuse: int = Field(4, ge=1)
    """Steps in which a text is learnt from: writing takes longer than learning."""
    divergence: DivergenceSpec | None = None
    """Instead of `distill.divergence`; the live teacher serves any but dkd and uld."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.sampling_temperature == 0 and self.top_p < 1:
            raise ValueError("`top_p` has no effect where nothing is drawn: leave it out")
        if self.divergence is not None and (why := _NOT_OWN.get(self.divergence.kind)):
            raise ValueError(f"`divergence` {why}: another one")
        return self


class QuantizationAwareSpec(Spec):
    """language-modeling: learn with the weights as a file will hold them, so that its rounding is
    made up for. The student of hard labels alone learns so too."""

    format: Literal["gguf-q8_0", "gguf-q4_0"]
    """One of `export.formats`."""
    share: float = Field(0.5, gt=0, le=1)
    """Of the training's steps, the last ones."""


class DistillSpec(Spec):
    temperature: TemperatureSpec = TemperatureSpec(fixed=2.0)
    """Softens teacher's and student's distribution alike; the loss is multiplied by its square."""
    divergence: DivergenceSpec = DivergenceSpec()
    """Between the teacher's and the student's softened distributions."""
    standardize: bool = False
    """Bring both sides' logits to mean 0 and deviation 1 first: relations are learnt, not range."""
    soft_weight: float = Field(1.0, gt=0)
    """Factor of the divergence, as given."""
    hard_weight: float = Field(0.5, ge=0)
    """Factor of the cross-entropy with the hard labels, as given."""
    hidden: HiddenSpec | None = None
    """Also learn from the teacher's hidden states."""
    embedding: EmbeddingSpec | None = None
    """Also learn from the teacher's embedding of an example."""
    on_policy: OnPolicySpec | None = None
    """Also learn from the teacher's view of the student's own texts. Default: from stored signals
    alone."""
    quantization_aware: QuantizationAwareSpec | None = None
    """Also learn to bear an exported file's rounding."""
    run: Literal["dedicated", "elastic"] = "dedicated"
    """`dedicated`: each student has weights of its own and a run of its own. `elastic`: one run for
    all, in which the smaller are the first units of the larger. The largest learns alone first, for
    its own `epochs`; then each step teaches one of the others, as often as its own say.
    `training.learning_rate` is the largest one's; smaller ones get more, if they name none.
    `limbeck scale` then cuts more of them without training."""
    rivals: int = Field(1, ge=1, le=8)
    """elastic: so many shapes for each budget, of unlike depth, are first trained together for a
    tenth of the time; the one with the least loss on the validation rows is taken. 1: the rule
    alone decides, without a trial."""
    balance: Literal["fixed", "calibrated", "uncertainty", "upgrad"] = "fixed"
    """`fixed`: the weights as given. `calibrated`: they are the ratio of the terms' gradient norms
    at the first steps. `uncertainty`: times weights that are learnt. `upgrad`: no term is worsened
    (extra 'balance')."""
    training: TrainingSpec
    """Every student's training run, and its baselines'."""
