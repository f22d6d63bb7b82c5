"""The shape of a run: ``model + data + stages``. Each field's docstring is its entry in the configuration reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vlit.config.component import component
from vlit.config.strict import Strict

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ModelConfig(Strict):
    """Which parts are put together."""

    encoder: component("encoder")  # type: ignore[valid-type]
    """Vision encoder: `hf`, `open_clip` or `timm`."""
    connector: component("connector")  # type: ignore[valid-type]
    """Maps vision tokens to the width of the language model: `linear`, `mlp` or `qformer`."""
    llm: component("llm")  # type: ignore[valid-type]
    """Language model: `hf` takes any transformers causal LM."""
    fusion: component("fusion") = {"type": "prefix"}  # type: ignore[valid-type]
    """How vision tokens enter the language model: `prefix` puts them where the text holds `<image>`."""
    init_from: str | None = None
    """Start from trained weights: a vlit model folder, LLaVA's `mm_projector.bin`, or a Hugging Face LLaVA folder."""


class DataSource(Strict):
    """One dataset of a mixture."""

    path: str
    """Dataset file, or the folder of a format that reads folders."""
    format: component("format") = {"type": "llava"}  # type: ignore[valid-type]
    """How records are read: `llava`, or the format of another published system."""
    images: str = ""
    """Folder the records' image paths are relative to. Empty: the folder of `path`, or `path` where it is a folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each record is seen per epoch: 0.5 = a random half, 2 = twice. A new half is drawn every epoch."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of a weight: the share of all records seen that come from here, whatever the sizes. All sources of a stage have
    one, or none has; they add up to 1."""
    max_records: PositiveInt | None = None
    """Use only this many records, drawn at random once with the run's seed."""
    name: str | None = None
    """Name in logs and reports. Default: the file's stem."""


def _switch(value: Any) -> Any:
    """YAML reads a bare on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class DataConfig(Strict):
    """How records become token sequences; shared by all stages unless a stage overrides it."""

    template: component("template") = {"type": "v1"}  # type: ignore[valid-type]
    """Chat template."""
    image_policy: Literal["pad", "crop", "squash"] = "pad"
    """`pad` to a square with the mean colour, resize the short side and `crop` the centre, or `squash` to the square."""
    exact_pixels: bool = False
    """Decode every JPEG at full size and resize with PIL, bit for bit as transformers' CLIP processor does. Default: about
    twice as fast (large photographs: three times); pixels differ by rounding, those of reduced large JPEGs by less than one
    level on average."""
    max_tokens: PositiveInt = 2048
    """Longest sample in tokens, images included. Longer records lose whole turns from the end, never part of an image."""
    on_bad_sample: Literal["error", "quarantine"] = "error"
    """`error` refuses a dataset with bad records and lists them; `quarantine` leaves them out and lists them in
    `quarantine.jsonl`."""
    quarantine_budget: Fraction = 0.01
    """A run ends with an error when more than this share of a dataset is quarantined."""
    share_images: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Bring records of one image together and compute what they have in common (the image above all) once. The gradients
    are those of separate records. `auto`: on, unless a trained part uses dropout, which shared tokens would draw once."""
    max_shared_records: Annotated[int, Field(ge=2)] = 8
    """Most records of one image that are brought together; the others of that image come elsewhere in the epoch."""
    group_by_modality: bool = False
    """Give every step records with images or records without, in random turns, as LLaVA's `group_by_modality_length` does.
    Losses of the two kinds of steps differ, so the loss curve jumps."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Loader processes. `auto`: 0 for fewer than 4 cores, else up to 8; 0 loads in the training process."""
    cache_dir: str | None = None
    """Where dataset indexes are kept. Default: `$VLIT_CACHE` or `~/.cache/vlit`."""
    follow_links: bool = False
    """Follow links inside an image folder that lead out of it. Default: such an image is refused, as a record could reach any
    file through them. The image folder itself may be a link."""
    manifest: str | None = None
    """Manifest of bad records that `vlit doctor` wrote. Default: `<output_dir>/doctor/manifest.jsonl` where it exists. Under
    `on_bad_sample: quarantine` its records are left out and count towards the budget, under `error` the first one ends the
    run before it starts."""
    check_samples: PositiveInt = 512
    """Samples looked at before training; the run refuses to start when more than 1 % of them have no supervised token."""


class PartTuning(Strict):
    """How one part of the model is trained."""

    mode: Literal["frozen", "full", "lora"] = "frozen"
    """`frozen`: no gradient, `full`: every weight, `lora`: low-rank adapters on its linear layers."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of this part. Default: the stage's `lr`."""
    rank: PositiveInt = 128
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 256.0
    """LoRA scale numerator; the update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA dropout."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """LoRA target modules by the last component of their name, or every linear layer of the part."""

    @property
    def adapter(self) -> tuple[int, float, str | frozenset[str]]:
        """What makes an adapter another one: rank, alpha and targets, not how it is trained."""
        return self.rank, self.alpha, self.targets if isinstance(self.targets, str) else frozenset(self.targets)


def _mode_or_mapping(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value


Tuning = Annotated[PartTuning, BeforeValidator(_mode_or_mapping)]


class TuningConfig(Strict):
    """Tuning mode of every part. A bare word is the mode: `llm: full`."""

    vision: Tuning = PartTuning(mode="frozen")
    connector: Tuning = PartTuning(mode="full")
    fusion: Tuning = PartTuning(mode="frozen")
    llm: Tuning = PartTuning(mode="frozen")
    embeddings: Tuning | None = None
    """Input and output embeddings. Default: `full` when `llm` is `full` (with its learning rate), else `frozen`."""

    @model_validator(mode="after")
    def _check(self) -> TuningConfig:
        for part in ("connector", "fusion", "embeddings"):
            tuning = getattr(self, part)
            if tuning is not None and tuning.mode == "lora":
                raise ValueError(f"{part}: mode lora is for vision and llm. Use full or frozen")
        return self

    def of(self, part: str) -> PartTuning:
        """The tuning of ``part`` with the default for embeddings filled in."""
        tuning = getattr(self, part)
        if tuning is not None:
            return tuning
        return PartTuning(mode="full", lr=self.llm.lr) if self.llm.mode == "full" else PartTuning(mode="frozen")


class OptimizerConfig(Strict):
    """Optimizer of a stage."""

    type: Literal["adamw", "muon"] = "adamw"
    """`muon`: torch's Muon for 2-D weights of hidden layers and AdamW for the rest (embeddings, norms, biases)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of matrices; biases and norms are never decayed."""


class ScheduleConfig(Strict):
    """Learning-rate schedule of a stage."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the rate rises linearly from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Overrides `warmup_ratio`."""
    min_ratio: Fraction = 0.0
    """Rate at the end as a share of the peak."""


class ValidationConfig(Strict):
    """Held-out loss and fixed sample answers during training."""

    data: list[DataSource] = []
    """Held-out records. Empty: no validation loss."""
    every_steps: PositiveInt = 100
    max_records: PositiveInt = 256
    sample_generations: Annotated[int, Field(ge=0)] = 4
    """Answers generated at each validation, always for the same first records."""
    max_new_tokens: PositiveInt = 64


class CheckpointConfig(Strict):
    """Resumable checkpoints of a stage."""

    every_steps: PositiveInt = 500
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Also save when this many minutes have passed since the last checkpoint."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    asynchronous: bool = True
    """Write in the background from a copy in host memory, while training goes on; `false` waits for the disk."""
    max_failures: PositiveInt = 3
    """This many failed saves in a row (a full disk, say) end the run; until then it goes on and warns."""


def _policy(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class StageConfig(Strict):
    """One training stage. Stages run in the order they are written; a finished one is marked and skipped."""

    data: Annotated[list[DataSource], Field(min_length=1)]
    """The mixture of this stage."""
    template: component("template") | None = None  # type: ignore[valid-type]
    """Overrides `data.template` for this stage."""
    image_policy: Literal["pad", "crop", "squash"] | None = None
    """Overrides `data.image_policy` for this stage."""
    max_tokens: PositiveInt | None = None
    """Overrides `data.max_tokens` for this stage."""
    tuning: TuningConfig = TuningConfig()
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of every trained part that has none of its own."""
    global_batch: PositiveInt
    """Records per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens in one forward pass; a step is split into as many packed rows as that takes."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: PositiveInt | None = None
    """Ends the stage early (and shortens its schedule), or extends it beyond `epochs` when larger."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-normaliser added to each supervised position's loss; keeps logits small (PaLM used 1e-4)."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    gradient_checkpointing: Annotated[Literal["none", "selective", "full"], BeforeValidator(_policy)] = "none"
    """Recompute activations in the backward pass. `selective` keeps matrix products and attention and recomputes the rest;
    `full` keeps only each block's input: least memory, about a third more time. `true` means `full`."""
    max_non_finite_steps: Annotated[int, Field(ge=0)] = 3
    """A step with a non-finite loss or gradient is not applied; more than this many end the run."""
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check_shares(self) -> StageConfig:
        shares = [source.share for source in self.data]
        if any(shares):
            if None in shares or any(source.weight != 1.0 for source in self.data):
                raise ValueError("data: share and weight do not go together. Give every source a share, or none")
            if abs(sum(share or 0.0 for share in shares) - 1.0) > 1e-6:
                raise ValueError(f"data: the shares add up to {sum(share or 0.0 for share in shares):g}, not to 1")
        return self


class OffloadConfig(Strict):
    """What ZeRO keeps outside of GPU memory."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Optimizer states and fp32 masters; `nvme` needs `zero3`."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Sharded weights between uses (`zero3` only)."""
    nvme_path: str | None = None
    """Folder on a fast local disk for `nvme`."""


class RuntimeConfig(Strict):
    """Where and how precisely to compute, and how several processes share the work."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16`: weights and activations in bfloat16 with fp32 master weights. `auto`: bf16 where the GPU or CPU multiplies it
    natively (AVX512-BF16, AMX), else fp32."""
    attention: Literal["auto", "triton", "flash", "blocked", "dense", "flex", "varlen"] = "auto"
    """Attention of the language model. `auto` takes the fastest exact one: `triton` on a GPU, `flash` (C kernel) or `blocked`
    on a CPU, `dense` (PyTorch's own) for windows and soft caps. `flex` and `varlen` are torch's, for comparison on a GPU."""
    compile: bool = False
    """Compile the blocks with torch.compile: about a tenth faster; the first step takes about a minute longer."""
    num_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads of this process. Default: all cores divided by the processes on this machine."""
    strategy: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """What the processes split besides the data: nothing (`ddp`), optimizer states (`zero1`), also gradients (`zero2`), also
    weights (`zero3`). `auto`: `none` for one process, `ddp` for several. One process needs no ZeRO and runs without it unless
    something is offloaded."""
    offload: OffloadConfig = OffloadConfig()
    deepspeed: dict[str, Any] | str | None = None
    """Further DeepSpeed settings, as a mapping or the path of a JSON file. Keys that vlit sets itself are refused."""
    preflight: bool = True
    """Compare versions, configuration and data of all processes, and try disk and collectives, before weights are loaded."""
    hang_timeout_s: Annotated[float, Field(gt=0)] | None = 1800.0
    """A process that makes no progress for this many seconds ends the run with the name of the rank and the phase it is in.
    Null: never."""


class RunConfig(Strict):
    """A run: one model, its data rules, and the stages that train it."""

    name: str = "run"
    output_dir: str = "outputs/run"
    """Everything the run writes goes here."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Decides initial connector weights and the order of the data."""
    plugins: list[str] = []
    """Python modules that register further components."""
    world: component("world") | None = None  # type: ignore[valid-type]
    """A self-made dataset to build first (`digits`); its files are then ordinary data sources."""
    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    stages: dict[str, StageConfig]
    """Stages by name, in order. A stage set to null is left out."""
    runtime: RuntimeConfig = RuntimeConfig()
    trackers: list[component("tracker")] = []  # type: ignore[valid-type]
    """Where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues an interrupted run of the same configuration; `never` refuses a non-empty `output_dir`."""
    allow_config_drift: bool = False
    """Resume although the configuration changed since the checkpoint (the difference is printed)."""

    @model_validator(mode="after")
    def _check_strategy(self) -> RunConfig:
        runtime, offload = self.runtime, self.runtime.offload
        zero = runtime.strategy.startswith("zero")
        needs_zero = {
            "runtime.offload.optimizer": offload.optimizer != "none",
            "runtime.offload.parameters": offload.parameters != "none",
            "runtime.deepspeed": runtime.deepspeed is not None,
        }
        for key, given in needs_zero.items():
            if given and not zero:
                raise ValueError(
                    f"{key}: needs ZeRO, and runtime.strategy is {runtime.strategy}. Set runtime.strategy to zero1, zero2 or "
                    "zero3, or leave the key out"
                )
        if runtime.strategy != "zero3" and (offload.parameters != "none" or offload.optimizer == "nvme"):
            raise ValueError("runtime.offload: parameters, and anything on nvme, need runtime.strategy zero3")
        if "nvme" in (offload.optimizer, offload.parameters) and offload.nvme_path is None:
            raise ValueError("runtime.offload.nvme_path: missing. Name a folder on a fast local disk")
        for name, stage in self.stages.items():
            if zero and stage.optimizer.type == "muon":
                raise ValueError(
                    f"stages.{name}.optimizer: muon needs whole matrices, {runtime.strategy} cuts them. Use adamw, or "
                    "runtime.strategy ddp"
                )
        return self

    @model_validator(mode="after")
    def _check_quantised(self) -> RunConfig:
        mode = getattr(self.model.llm, "quantize", "none")
        if mode == "none":
            return self
        adapters: dict[str, PartTuning] = {}
        for name, stage in self.stages.items():
            for part in ("llm", "embeddings"):
                if stage.tuning.of(part).mode == "full":
                    raise ValueError(
                        f"stages.{name}.tuning.{part}: full, but model.llm.quantize is {mode}, and quantised weights cannot be "
                        "trained. Use llm: lora and embeddings: frozen, or quantize: none"
                    )
            if stage.tuning.llm.mode == "lora":
                adapters[name] = stage.tuning.llm
        if len({tuning.adapter for tuning in adapters.values()}) > 1:
            raise ValueError(
                f"stages {', '.join(adapters)}: another rank, alpha or targets of llm in each would merge the adapters in "
                f"between, which model.llm.quantize {mode} does not allow. Write the same settings, or quantize: none"
            )
        return self

    @field_validator("stages")
    @classmethod
    def _at_least_one(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        if not stages:
            raise ValueError("a run needs at least one stage")
        for name in stages:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f'stage name "{name}" must consist of letters, digits, - and _ (it names a folder)')
        return stages

    def data_for(self, stage: str) -> DataConfig:
        """The data rules of one stage: ``data`` with the stage's own template, image policy and length."""
        cfg = self.stages[stage]
        own = {k: getattr(cfg, k) for k in ("template", "image_policy", "max_tokens") if getattr(cfg, k) is not None}
        return self.data.model_copy(update=own)
