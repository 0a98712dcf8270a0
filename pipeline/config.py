"""``params.yaml`` as frozen, validated models: every number a user may change, with its unit.

The defaults here are the project's defaults; the ``params.yaml`` in the repository spells them out
(a test holds the two equal). Unknown keys and values out of range are errors.

What decides a result is marked at its field, once: whether a run may continue, whether two runs
share a first model, and whether two runs are seeds of one experiment all follow from the marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from pipeline.methods import METHODS, Method, methods_for
from pipeline.names import (
    check_mask_pattern,
    different_names,
    encoder_name,
    folder_name,
    site_name,
)

Count = Annotated[int, Field(gt=0, lt=2**31)]  # no array of torch or ONNX Runtime is longer
CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy, torch and dask all take it
ClassCount = Annotated[int, Field(ge=1, le=254)]  # K foreground classes
Side = Annotated[int, Field(ge=16, le=2048, multiple_of=16)]  # of the client's frame, px
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Architecture = Literal["unet", "fpn", "linknet", "deeplabv3plus", "segformer"]

AggregationName = Literal["fedavg", "median", "trimmed_mean", "krum", "multi_krum"]
ServerOptimizer = Literal["none", "fedavgm", "fedadam"]
Compression = Literal["none", "float16", "int8"]
Precision = Literal["fp32", "bf16"]
Flips = Literal["none", "horizontal", "both"]
Frame = Literal["pad", "content"]
Rule = Literal[
    "adaptive", "consensus", "confident", "soft", "sam_only", "sam_soft", "client_only"
]  # fmt: skip


@dataclass(frozen=True)
class Decides:
    """Mark of a setting: what of a run depends on it."""

    run: bool = True  # the result of the rounds: another value cannot continue a run
    first_model: bool = False  # the model before round 1, trained on D_p alone
    experiment: bool = True  # another value is another experiment, not a repetition of one


_NOTHING = Decides(run=False, experiment=False)  # where, how fast, what is warned of
_RUN = Decides()
_FIRST_MODEL = Decides(first_model=True)
_REPETITION = Decides(first_model=True, experiment=False)  # the seed, and what changes rounding
_AUDIT = Decides(experiment=False)  # changes what a run reports, and no model
_TEACHER = Decides(run=False)  # rounds depend on it through the labels' identity


def _refuse_box(prompt: object) -> object:
    if prompt == "box":  # an adapted teacher labels better
        raise ValueError("the box prompt was removed; use none (adapted), or points (SAM as it is)")
    return prompt


class Section(BaseModel):
    """Part of the settings; ``decides`` is the mark of the fields that have none of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    decides: ClassVar[Decides] = _NOTHING


class DataConfig(Section):
    """What comes in."""

    root: Path = Path("data/synthetic")  # folder with images/, masks/ and optionally sites.csv
    # name of the mask of image {id} in masks/; .* is any of png jpg jpeg tif tiff bmp gif
    mask_pattern: Annotated[str, AfterValidator(check_mask_pattern)] = "{id}.*"
    num_classes: Annotated[ClassCount, _FIRST_MODEL] = 1  # K foreground classes
    class_names: tuple[str, ...] = ()  # of the classes 1..K, for tables and pages
    image_size: Annotated[Side, _FIRST_MODEL] = 64  # side of the client's frame, px

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = self.class_names
        if names and (len(names) != self.num_classes or not all(map(str.strip, names))):
            raise ValueError(
                f"class_names has {len(names)} names; expected one for each of {self.num_classes} "
                "classes, none of them empty"
            )
        if len({*names}) < len(names):
            raise ValueError(f"class_names {', '.join(names)}: expected different names")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classes 1..K are called; without ``class_names`` by their numbers."""
        if self.class_names or self.num_classes == 1:
            return self.class_names or ("foreground",)
        return tuple(f"class {number}" for number in range(1, self.num_classes + 1))


class CacheConfig(Section):
    """Where everything that can be rebuilt goes."""

    root: Path = Path("cache")  # folder of stores, teacher and runs


class SynthConfig(Section):
    """The embedded default data set."""

    images_per_site: Count = 130  # of each of the four sites
    size_px: Annotated[int, Field(ge=32, le=2048)] = 128  # image height
    seed: Seed = 0  # of the images alone: runs with several seeds share one data set


class PartitionConfig(Section):
    """Who owns which image."""

    # by chance, skewed, by site of origin, or with so many images each
    scheme: Literal["iid", "dirichlet", "site", "sizes"] = "site"
    file: Path | None = None  # a partition.json, or a split of HSSF, to read instead of drawing one
    clients: Count = 4  # iid and dirichlet: number of clients
    clients_per_site: Count = 1  # site: clients that share one site's images
    sizes: tuple[Count, ...] = ()  # sizes: images of each client
    by: Literal["size", "site"] = "size"  # dirichlet: what is skewed (foreground area or site)
    alpha: PositiveFloat = 0.5  # dirichlet: concentration; smaller is more skewed
    server_images: Count = 30  # the public set D_p, calibration part included
    server_kept: Count | None = None  # use only so many of these; the others stay unused
    server_site: str | None = "site_a"  # where D_p comes from; null = anywhere
    calibration_fraction: Fraction = 0.2  # part of D_p that nothing is trained on
    calibration_min: Count = 10  # and at least so many images, of several groups
    val_fraction: Fraction = 0.1  # of each client
    test_fraction: Fraction = 0.3  # of each client

    @model_validator(mode="after")
    def _check(self) -> PartitionConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must leave something to train on")
        if self.scheme == "sizes" and not self.sizes:
            raise ValueError("scheme 'sizes' needs partition.sizes, e.g. [120, 80, 40]")
        return self


class SamConfig(Section):
    """The teacher and how it is adapted to the public set D_p."""

    decides = _TEACHER

    variant: str = "vit_t"  # vit_t | vit_b | vit_l | vit_h | mobile_sam | timm:<backbone>
    checkpoint: Path | None = None  # of SAM, or timm: of the backbone; .pth or .safetensors
    # timm and mobile_sam only, pixels
    input_size: Annotated[int, Field(ge=64, le=4096, multiple_of=32)] | None = None
    # pad: every image in a square; content: in whole patches, without the rest of the square
    frame: Frame = "pad"
    # none: adapted; points: SAM as it comes, prompted by a grid
    prompt: Annotated[Literal["none", "points"], BeforeValidator(_refuse_box)] = "none"
    points_per_side: Annotated[int, Field(ge=1, le=64)] = 16  # points: of the grid
    lora_rank: Count = 8  # vit_* and mobile_sam: rank of the updates to q and v
    epochs: Count = 60  # of fine-tuning
    batch_size: Count = 4  # images per training step
    learning_rate: PositiveFloat = 2e-3  # decoder, prompt embedding, LoRA; timm: neck and decoder
    encoder_learning_rate: PositiveFloat = 5e-4  # timm only: the backbone
    weight_decay: NonNegativeFloat = 0.01  # AdamW's
    warmup_fraction: Fraction = 0.1  # of all steps, linear
    decay_power: PositiveFloat = 0.9  # polynomial decay after the warm-up
    dice_weight: Fraction = 0.8  # rest is cross-entropy (SAMed: 0.8 and 0.2)
    threads: Count = 2  # torch threads of fine-tuning on the CPU; pinned, for equal results
    device: str = "auto"  # of fine-tuning: auto, cpu, cuda, cuda:N

    @property
    def prompt_policy(self) -> str:
        """The prompt with what decides its masks: ``none`` or ``points:<per side>``."""
        return f"points:{self.points_per_side}" if self.prompt == "points" else self.prompt

    @property
    def adapter_rank(self) -> int | None:
        """The rank of LoRA; None for a teacher that is trained whole or not at all."""
        has_lora = self.prompt == "none" and not self.variant.startswith("timm:")
        return self.lora_rank if has_lora else None


class PrecomputeConfig(Section):
    """Stage one: how the teacher is run."""

    backend: Literal["torch", "onnx"] = "torch"  # onnx: ONNX Runtime, after `samfed export-onnx`
    batch_size: Count = 8  # images per forward pass; a shard holds 64 rows
    # auto: bf16 where the device has it and masks do not move, else fp32; int8: a CPU with VNNI
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    device: str = "auto"  # of the teacher: auto, cpu, cuda, cuda:N
    compile: bool = False  # CUDA: torch.compile the encoder, which takes minutes at the start
    # vit_*, global blocks; auto: the fastest for the device (benchmarks/attention.py)
    attention: Literal["auto", "bias", "flex"] = "auto"
    residual: Literal["fp32", "bf16"] = "fp32"  # vit_*: what blocks add to; bf16 must keep masks
    views: Annotated[Literal[1, 2, 4, 8], _TEACHER] = 1  # flips and turns whose mean is the label
    probabilities: bool | None = None  # keep those of every class; null: where there are several
    readers: Count | None = None  # threads that decode; null = one a core, or a worker's share
    threads: Count | None = None  # torch threads on the CPU; null = all, or a worker's share
    warn_consistency: Fraction = 0.7  # Dice of a flipped image's label below this is a warning
    warn_empty: Fraction = 0.5  # share of empty masks above this is a warning

    def keeps_probabilities(self, num_classes: int) -> bool:
        """Return whether those of every class are kept beside labels of so many classes."""
        return num_classes > 1 if self.probabilities is None else self.probabilities


class NetworkConfig(Section):
    """A network of segmentation-models-pytorch."""

    decides = _RUN

    architecture: Architecture = "unet"  # decoder behind the encoder
    # smp encoder name; tu-<name> is timm's
    encoder: Annotated[str, AfterValidator(encoder_name)] = "tu-mobilenetv3_small_050"
    encoder_depth: Annotated[int, Field(ge=3, le=5)] = 4  # levels; each halves the sides
    # U-Net: one per depth; segformer: one; fpn, linknet and deeplabv3plus do not use them
    decoder_channels: tuple[Count, ...] = (48, 32, 24, 16)
    encoder_weights: Path | None = None  # local .safetensors with the encoder's timm weights
    normalisation: Literal["batch", "group"] = "batch"  # group: no statistics of the images


class ModelConfig(NetworkConfig):
    """The global network, and the clients' own where they differ."""

    # heterogeneous clients: networks in the order of the clients, from the start again where there
    # are more clients; what is left out is NetworkConfig's default. Empty: all use the global one
    clients: tuple[NetworkConfig, ...] = ()


class AugmentConfig(Section):
    """Random views of training images, the teacher's and the clients' (docs/method.md)."""

    decides = _FIRST_MODEL

    flips: Flips = "both"  # none, where left and right or up and down mean something
    turns: bool = True  # quarter turns
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 20.0  # degrees, either way
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2  # relative, either way
    shift: Fraction = 0.08  # of the image's side, either way
    # factor of the labelled and strong views' changes of light, colour, blur and noise
    intensity: Annotated[float, Field(ge=0.0, le=3.0)] = 1.0


class AgreementConfig(Section):
    """How SAM's label and the client's own prediction become one target (docs/method.md)."""

    decides = _RUN

    rule: Rule = "adaptive"  # whose label counts where, and how much
    # `confident`, `client_only`: probability above which a source is believed
    threshold: Fraction = 0.9
    calibrate: bool = True  # `adaptive`, `sam_soft`: measure sources on D_p's calibration part
    warn_agreement: Annotated[Fraction, _NOTHING] = 0.3  # warn of a foreground Dice below it
    warn_coverage: Annotated[Fraction, _NOTHING] = 0.3  # warn of a share of pixels kept below it


class FederateConfig(Section):
    """Stage two."""

    decides = _RUN

    name: Annotated[str, AfterValidator(folder_name), _NOTHING] = "sam_fed"  # under cache/runs
    method: Method = "sam_fed"  # what clients learn from, and exchange
    rounds: Count = 15  # of local training and aggregation
    average_rounds: Count = 1  # the final model is the mean over so many last rounds
    # clients at sites of their own, which the server knows by name alone; empty: the partition's
    sites: Annotated[
        tuple[Annotated[str, AfterValidator(site_name)], ...], AfterValidator(different_names)
    ] = ()
    clients_per_round: Count | None = None  # drawn anew each round; null = all
    # a round that ends with fewer usable updates is repeated once, then the run stops
    min_clients: Annotated[Count, _NOTHING] = 1
    # for each request of a round; who takes longer is left out of it. null = any time
    round_timeout_s: Annotated[PositiveFloat | None, _NOTHING] = None
    aggregation: AggregationName = "fedavg"  # how the server combines updates
    byzantine: CountOrNone = 1  # trimmed_mean, krum, multi_krum: clients that may be hostile
    server_optimizer: ServerOptimizer = "none"  # of the averaged change of the model
    server_learning_rate: PositiveFloat | None = None  # null: 1 for fedavgm, 0.01 for fedadam
    server_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # of both; Adam's beta_1
    server_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99  # fedadam
    server_tau: PositiveFloat = 1e-3  # fedadam: added to the root of the second moment
    proximal_weight: NonNegativeFloat = 0.0  # FedProx's mu: holds clients to the broadcast model
    compression: Compression = "none"  # of the weights that travel, either way
    pretrain_steps: Annotated[CountOrNone, _FIRST_MODEL] = 200  # of each first model, on D_p
    local_steps: Count = 10  # optimiser steps of each client in a round
    # images of D_p in a step; batch norm needs two
    labelled_batch: Annotated[Count, Field(ge=2), _FIRST_MODEL] = 8
    unlabelled_batch: Count = 8  # images of a step whose labels are SAM's or the client's own
    pretrain_learning_rate: Annotated[PositiveFloat, _FIRST_MODEL] = 2e-3  # falls as a cosine
    learning_rate: PositiveFloat = 2e-3  # of the rounds; falls as a cosine over them
    weight_decay: Annotated[NonNegativeFloat, _FIRST_MODEL] = 1e-4  # AdamW's
    unlabelled_weight: NonNegativeFloat = 1.0  # lambda_u after its ramp
    ramp_rounds: CountOrNone = 2  # rounds over which lambda_u grows from 0
    confidence_threshold: Fraction = 0.95  # of a client's own pseudo-labels (FixMatch)
    fusion_epochs: Count = 4  # heterogeneous: passes over D_p of RC, of RF, of FedMD's digest
    fusion_weight: NonNegativeFloat = 10.0  # heterogeneous: of the KL term in RC and RF
    fusion_warmup_rounds: CountOrNone = 0  # heterogeneous: rounds without that term
    audit: Annotated[bool, _AUDIT] = False  # report how cache/oracle's truth scores pseudo-labels
    link_mbit: Annotated[PositiveFloat, _NOTHING] = 100.0  # slower than computing is a warning
    warn_drift: Annotated[PositiveFloat, _NOTHING] = 3.0  # warn above so many times the median's
    threads: Annotated[Count, _REPETITION] = 2  # torch's; pinned, for equal results
    precision: Annotated[Precision, _FIRST_MODEL] = "fp32"  # bf16: faster where the device has it
    device: Annotated[str, _REPETITION] = "auto"  # of the clients: auto, cpu, cuda, cuda:N

    @property
    def played_rounds(self) -> int:
        """How many rounds a run has: one where nothing is trained in it."""
        return self.rounds if METHODS[self.method].trains else 1


class EvaluateConfig(Section):
    """How finished models are scored."""

    # surface Dice (NSD): how far outlines may lie apart
    tolerance_px: PositiveFloat = 2.0  # in the client's frame
    tolerance_mm: PositiveFloat = 2.0  # the same in mm, where spacing is known


class PrivacyConfig(Section):
    """Differential privacy of whole clients (docs/method.md)."""

    decides = _RUN

    # server: noise in the sum of updates; client: in each of them, against the server too
    mode: Literal["none", "server", "client"] = "none"
    clip_norm: PositiveFloat = 1.0  # C, the longest update
    noise_multiplier: PositiveFloat = 1.0  # z: the noise's standard deviation is z C
    delta: Annotated[float, Field(gt=0.0, lt=1.0), _AUDIT] = 1e-5  # that epsilon is told at

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self.mode != "none"


class Config(Section):
    """All of ``params.yaml``."""

    seed: Annotated[Seed, _REPETITION] = 0  # of partition, teacher and rounds
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    synth: SynthConfig = SynthConfig()
    partition: PartitionConfig = PartitionConfig()
    sam: SamConfig = SamConfig()
    precompute: PrecomputeConfig = PrecomputeConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    agreement: AgreementConfig = AgreementConfig()
    federate: FederateConfig = FederateConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        own, method = self.heterogeneous, self.federate.method
        if METHODS[method].networks == "own" and not own:
            raise ValueError(
                f"federate.method {method} is for clients with networks of their own; "
                "list them in model.clients"
            )
        federate, averages = self.federate, METHODS[method].networks == "equal"
        others = [
            f"federate.{key} {getattr(federate, key)}"
            for key in ("aggregation", "server_optimizer", "proximal_weight", "compression")
            if getattr(federate, key) != FederateConfig.model_fields[key].default
        ]
        if own and (averages or others):
            raise ValueError(
                f"{method if averages else others[0]} builds on averaged weights, which "
                "clients with networks of their own (model.clients) do not share; expected one of "
                f"{', '.join(methods_for('own'))}, with aggregation fedavg, server_optimizer none, "
                "proximal_weight 0 and compression none"
            )
        return self

    @property
    def heterogeneous(self) -> bool:
        """Whether clients have networks of their own and exchange predictions, not weights."""
        return bool(self.model.clients)

    def network_of(self, index: int) -> NetworkConfig:
        """Return the network of client ``index``: ``model.clients`` in turn, or the global one."""
        own = self.model.clients
        return own[index % len(own)] if own else self.model
