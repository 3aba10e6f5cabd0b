"""The LightningModule: loss, logging and optimizer around the decoder.

B batch, N length, V vocabulary.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dma_lightning.auxiliary_losses import end_auxiliary_losses, lead_auxiliary_losses
from dma_lightning.checkpoints.io import local_checkpoint
from dma_lightning.checkpoints.weights import check_arguments, check_layers
from dma_lightning.config import ModelConfig
from dma_lightning.data.base import IGNORE_INDEX, Batch
from dma_lightning.data.parts import part_of_batch
from dma_lightning.files.reading import verifies_content
from dma_lightning.initial_weights import InitialWeights
from dma_lightning.lora import LoraArguments, add_adapters_of
from dma_lightning.losses import TokenScores, check_loss_chunk, token_losses
from dma_lightning.metrics import EvaluationMetrics, bits_per_byte
from dma_lightning.model import DogeForCausalLM
from dma_lightning.optimizers import OptimizerName, check_optimizer, make_optimizer, weights_with_one_moment
from dma_lightning.plain_values import PlainHyperparameters, plain
from dma_lightning.saved_run import SavedRun
from dma_lightning.schedules import Schedule, check_schedule, lr_factor, total_steps
from dma_lightning.step_means import StepTotals, scale_gradients
from dma_lightning.step_memory import least_step_bytes, too_large
from dma_lightning.trained_parts import TrainedPart, freeze_others
from dma_lightning.trainer_state import accumulates, has_trainer, is_logging_step, saved_device
from dma_lightning.vocabularies import check_tokens, check_vocabulary

# Options for compiled layers: a value that two kernels read, such as the rotary embedding's gradient, is computed in
# both of them instead of being written out in float32.
_INDUCTOR = {"realize_reads_threshold": 12}


class _Arguments(AttributeDict):
    """Types of the arguments of `LanguageModel` in `hparams`, which also holds those of a `ModelConfig`."""

    lr: float
    weight_decay: float
    optimizer: OptimizerName
    betas: Sequence[float]
    schedule: Schedule
    warmup_fraction: float
    decay_fraction: float
    bytes_per_token: float | None
    compile_layers: bool
    cuda_graphs: bool
    activation_checkpointing: bool
    loss_chunk: int | None
    lora: LoraArguments | None


class LanguageModel(PlainHyperparameters, pl.LightningModule):
    """Trains a Doge decoder with AdamW or Muon to predict the labels of each position.

    Args:
        lr: peak learning rate.
        weight_decay: decay of the matrices. Norms, residual weights, A, and the matrix that computes the content of
            ranks from the input have none.
        betas: decay rates of AdamW's moments.
        schedule: learning rate over the steps: wsd (warm-up, stable, linear decay to 0), cosine, or constant.
        warmup_fraction: share of all steps in which the learning rate rises linearly. The number of all steps is
            trainer.max_steps or, if that is not set, the number of steps in trainer.max_epochs.
        decay_fraction: share of all steps, at the end, in which the learning rate of wsd falls linearly.
        bytes_per_token: mean bytes of a token; none for data that is not text. It does not affect bits per byte, which
            are reported for batches that have `label_bytes`.
        compile_layers: compile every layer and the loss (torch.compile), when a trainer runs the model.
        cuda_graphs: run compiled layers as CUDA graphs, whose kernels the GPU launches by itself. This helps where the
            CPU launches them too slowly: in small models, or long steps of many kernels. It works on one GPU and with
            DDP. Each new batch shape costs memory.
        activation_checkpointing: store no activations within layers; the backward pass computes them again.
        init_from: weights to start from when a trainer first runs the model without a checkpoint: a checkpoint of
            ours, or a folder of Transformers with a Doge, Llama, Qwen2 or Qwen3. Optimizer, schedule and data start
            from scratch. On the command line, the model's sizes also come from there.
        padded_vocab_size: rows of the embedding and the output head, if there are more of them than different tokens in
            the data, as in many published models.
        train_only: which weights to train: all, those of the attention in all layers (attention), or only those that
            decide which keys are kept (selection). The others stay as they are.
        loss_chunk: for how many tokens the logits are in memory at once. The loss is computed in chunks of this size,
            and the backward pass computes the logits of a chunk again. Default: the whole batch at once, with no logits
            computed twice.
        optimizer: adamw, or muon: Muon for the matrices within layers, and AdamW for everything else. Both parts have
            the same learning rate and weight decay.
        lora: options of low-rank adapters (rank, alpha, targets, dropout; see `dma_lightning.lora`). If they are given,
            only adapters are trained, and the part that train_only names, unless that is all. This needs the extra
            lora.
        config: the fields of `ModelConfig`.
    """

    hparams: _Arguments
    _batch_labels: Tensor | None = None  # number of labels of the last batch, in all parts of its sequences
    _data_is_known = False  # whether no batch can have a token that the model does not know
    _epoch_steps: int | None = None  # steps of trainer.max_epochs, if a schedule needs them

    def __init__(
        self,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Schedule = "wsd",
        warmup_fraction: float = 0.1,
        decay_fraction: float = 0.2,
        bytes_per_token: float | None = None,
        compile_layers: bool = False,
        cuda_graphs: bool = False,
        activation_checkpointing: bool = False,
        init_from: str | None = None,
        padded_vocab_size: int | None = None,
        train_only: TrainedPart = "all",
        loss_chunk: int | None = None,
        optimizer: OptimizerName = "adamw",
        lora: LoraArguments | None = None,
        **config: Any,
    ) -> None:
        super().__init__()
        check_optimizer(optimizer, lr, weight_decay, betas)
        check_schedule(schedule, warmup_fraction, decay_fraction)
        check_loss_chunk(loss_chunk)
        if cuda_graphs and (activation_checkpointing or not compile_layers):
            raise ValueError(
                "cuda_graphs: expected compile_layers and no activation_checkpointing, got "
                f"{compile_layers} and {activation_checkpointing}; change these, or leave cuda_graphs out"
            )
        config = plain(config, type(self).__name__)
        self.save_hyperparameters(ignore=["init_from"])  # a checkpoint has its own weights
        shape = ModelConfig(**config)
        self.model = DogeForCausalLM(replace(shape, vocab_size=max(padded_vocab_size or 0, shape.vocab_size)))
        self.model.activation_checkpointing = activation_checkpointing
        freeze_others(self.model, train_only)
        add_adapters_of(self.model, lora, train_only, optimizer)
        self._token_losses = token_losses
        self._batches: list[StepTotals] = []  # of the current step
        self.init_from = init_from
        self._has_begun = False  # whether the weights come from a checkpoint or `init_from`, or have been trained
        self._restored = False  # whether optimizer and schedule come from a checkpoint
        self.step_loss: Tensor | None = None
        """Mean loss of the last step over all of its labels, set after its backward pass; 0 if it had no labels."""
        self.val_metrics = EvaluationMetrics(self.model.config.vocab_size)
        self.test_metrics = EvaluationMetrics(self.model.config.vocab_size)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's version would also read hparams_file
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **changed: Any,
    ) -> Self:
        """The model of a checkpoint, whose arguments are read as plain values of known fields.

        Args:
            checkpoint_path: a file on this machine.
            map_location: device of the weights. Default: the checkpoint's, if it exists here.
            strict: whether checkpoint and model must have the same weights. Default: the model's `strict_loading`.
            weights_only: must be true or none; false would let a checkpoint run code.
            **changed: arguments of `__init__` that replace the checkpoint's.

        Raises:
            ValueError: if the file is damaged or could run code; or if it holds unknown arguments, or weights that do
                not fit a model with its arguments.
        """
        path = local_checkpoint(checkpoint_path, weights_only)
        return cls.from_saved(SavedRun.open(path, map_location or saved_device), strict, **changed)

    @classmethod
    def from_saved(cls, saved: SavedRun, strict: bool | None = None, **changed: Any) -> Self:
        """The model of an opened checkpoint; arguments and errors are those of `load_from_checkpoint`."""
        path, weights = saved.path, saved.weights
        arguments = saved.model_arguments(cls) | changed
        layers = arguments.get("num_hidden_layers", ModelConfig.num_hidden_layers)
        if path.is_dir() or not weights:
            raise ValueError(f"{path}: expected a checkpoint of one file with weights, got one without")
        if strict is not False or "num_hidden_layers" not in changed:
            check_layers(weights, layers, path)
        check_arguments(weights, cls, arguments, path, strict is not False)
        module = cls(**arguments)
        module.configure_model()
        module.on_load_checkpoint(saved.content)
        state = saved.content["state_dict"]
        module.load_state_dict(state, strict=module.strict_loading if strict is None else strict)
        return module.to(next(iter(state.values())).device)

    def forward(self, input_ids: Tensor, documents: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits `[B, N, V]` of token ids `[B, N]`; see `DogeForCausalLM.forward`."""
        return self.model(input_ids, documents, padding)

    def setup(self, stage: str) -> None:
        """Set up answer groups, load the initial weights, and check what the model and the strategy can do.

        Raises:
            ValueError: if the data has tokens that the model does not know; if `init_from` holds no weights for this
                model; if sequences are to be divided for an attention that needs them whole; if CUDA graphs are
                requested without a GPU, or with gradients that outlive the memory of a graph; for `predict` if
                processes share the weights.
        """
        data = getattr(self.trainer, "datamodule", None)
        if (vocab_size := getattr(data, "vocab_size", None)) is not None:
            check_vocabulary(vocab_size, self.model.vocab_size)
        # Lightning warns for every data module that the hook below belongs to the model.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `Lightning")
        self._data_is_known = vocab_size is not None and verifies_content()
        groups = getattr(data, "answer_groups", {})
        for metrics in (self.val_metrics, self.test_metrics):
            metrics.split_answers(groups)
            metrics.reset()  # old sums may be inference tensors, which training cannot add to
        self._begin(data)
        self.model.join_context(getattr(self.trainer.strategy, "context_group", None))
        strategy, accumulate = self.trainer.strategy, self.trainer.accumulate_grad_batches
        if stage == "predict" and isinstance(strategy, ModelParallelStrategy) and self.trainer.world_size > 1:
            raise ValueError(
                "predict: expected one process, or DDP, since processes that share the weights must call the model "
                f"equally often; got {self.trainer.world_size} with {type(strategy).__name__}"
            )
        if stage != "fit" or not self.hparams.cuda_graphs:
            return
        if strategy.root_device.type != "cuda" or isinstance(strategy, ModelParallelStrategy) or accumulate > 1:
            raise ValueError(
                "cuda_graphs: expected a GPU, weights that are not sharded and accumulate_grad_batches 1, got "
                f"{strategy.root_device}, {type(strategy).__name__} and {accumulate}; change these, or leave it out"
            )

    def _begin(self, data: Any) -> None:
        """Load the weights of `init_from`, once, and before anything shards them."""
        if self.init_from is None or self._has_begun:
            return
        initial = InitialWeights.open(self.init_from, type(self))
        for line in initial.lines(initial.fill(self.model)):
            rank_zero_only(print)(line)
        self._has_begun = True
        if (tokenizer := getattr(data, "tokenizer", None)) and not initial.knows_tokens_of(tokenizer):
            rank_zero_warn(
                f"init_from {initial.path}: its tokenizer numbers tokens differently from the data's, so the embedding "
                "rows do not match; give the data the tokenizer.json of that model"
            )

    def configure_model(self) -> None:
        """Compile the layers and shard them (FSDP2, with `ModelParallelStrategy`) in place, without new names."""
        if self.hparams.compile_layers:
            # DDP can send gradients after each layer; Dynamo would also split the layers, at every 25 MB.
            torch._dynamo.config.optimize_ddp = False
            for layer in self.model.layers:
                layer.compile(options=_INDUCTOR | {"triton.cudagraphs": self.hparams.cuda_graphs})
            self._token_losses = torch.compile(token_losses)  # otherwise the logits are written out in float32, twice
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            if self.device_mesh.size() > mesh.size():  # processes that divide sequences also divide weights
                mesh = init_device_mesh(mesh.device_type, (self.device_mesh.size(),))
            for module in (*self.model.layers, self.model):
                fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(self.model, "scores")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check the tokens while they are on the CPU, unless the data is known to have only valid ones.

        If processes divide sequences, return only this process's part.

        Raises:
            ValueError: if the model does not know a token; if processes divide sequences and these are answers.
        """
        if not self._data_is_known and batch["input_ids"].device.type == "cpu":
            check_tokens("input_ids", batch["input_ids"], self.model.vocab_size)
            check_tokens("labels", batch["labels"], self.model.vocab_size, ignored=IGNORE_INDEX)
        return batch if self.model.context is None else part_of_batch(batch, self.model.context)

    def on_fit_start(self) -> None:
        config = self.model.config
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it from outside
        length = getattr(data, "sequence_length", config.max_position_embeddings)
        reasons = [mixer.unused_at(length) for mixer in self.model.mixers]
        if all(reasons):  # some layer may keep fewer keys
            rank_zero_warn(str(reasons[0]))
        if (batch_size := getattr(data, "batch_size", None)) and (reason := self._too_large(batch_size, length)):
            rank_zero_warn(reason)
        if self.global_rank > 0:  # weights are drawn by now; dropout must differ from the first process
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def _too_large(self, batch_size: int, length: int) -> str | None:
        """A warning if a step of the trainer cannot fit into memory."""
        trainer, precision = self.trainer, str(self.trainer.precision)
        number_bytes = 2 if "16" in precision else 8 if "64" in precision else 4
        shards = 1 if self.device_mesh is None else trainer.world_size
        part, chunk = -(-length // self.model.parts), self.hparams.loss_chunk
        spared = weights_with_one_moment(self.hparams.optimizer, self.model)
        needed = least_step_bytes(self.model, batch_size, part, number_bytes, shards, chunk, spared)
        sharing = trainer.num_devices if self.device.type == "cpu" else 1  # processes that share one memory
        return too_large(needed * sharing, self.device, batch_size, length)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the labels of a batch; `backward` weights it if a step has several batches."""
        if has_trainer(self):
            for mixer in self.model.mixers:
                mixer.begin_step(self.trainer.global_step)
        loss, totals = self._loss(batch)
        lead_auxiliary_losses(loss)
        if has_trainer(self):
            self._batches.append(totals)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the mean over labels, or, if a step has several batches, the sum.

        Lightning and DDP divide by the number of batches; `on_after_backward` replaces that by the number of labels.
        Auxiliary losses of layers get the weight of their batch.
        """
        if self._batches_in_step == 1:
            loss.backward()
        else:
            # Divided by a constant, so that half-precision gradients do not overflow: they are at most B times those of
            # the mean.
            assert self._batch_labels is not None  # from `training_step`
            loss.backward(self._batch_labels / self.model.config.max_position_embeddings)
        end_auxiliary_losses()

    def on_after_backward(self) -> None:
        """Rescale the gradient of a step to that of the mean over all of its labels, and log that mean."""
        if accumulates(self.trainer):
            return
        totals = StepTotals.of(self._batches, self.trainer.world_size)
        self._batches.clear()
        if self._batches_in_step > 1:
            scale = self.model.config.max_position_embeddings * self._batches_in_step
            scale_gradients(self.parameters(), scale / totals.labels.clamp(min=1))
        self.step_loss = totals.mean
        if is_logging_step(self.trainer, before_step=True):
            logs = {"train/loss": self.step_loss, "train/perplexity": self.step_loss.exp()}
            if totals.size is not None:
                logs["train/bits_per_byte"] = bits_per_byte(totals.nats_per_byte)
            # SpeedMonitor puts the loss into the progress bar; Lightning would wait for the device in every step.
            self.log_dict(logs)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the metrics.

        Returns:
            `token_losses` `[B, N]`, the loss of each label in nats, 0 without a label; for callbacks.
        """
        return {"token_losses": self._evaluate(batch, "val", self.val_metrics)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The likeliest token at every position, and the log-probability of its label (0 without a label)."""
        losses, tokens = self._scores(batch, predict=True)
        assert tokens is not None
        return {"tokens": tokens, "label_log_probs": -losses}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if not is_logging_step(self.trainer, before_step=True):
            return
        with _set_aside(self._auxiliary_parameters):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # A step skipped by GradientGuard has no gradients; without a value, Lightning would log the previous step's.
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.nan
        self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip parameters trained by auxiliary losses separately from all others, each group by its own norm."""
        auxiliary = self._auxiliary_parameters
        others = set(self.parameters()).difference(auxiliary)
        for left_out in (auxiliary, others) if auxiliary else ((),):
            with _set_aside(left_out):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule per optimizer step.

        Raises:
            ValueError: if the schedule needs the number of steps and nothing determines it.
        """
        hp = self.hparams
        self._epoch_steps = None
        # Counting the steps of epochs starts the data, before a checkpoint's position in it could be restored.
        if self.trainer.max_steps < 1 and self.trainer.ckpt_path is None and not self._restored:
            self._count_steps_of_epochs()
        optimizer = make_optimizer(hp.optimizer, self, self.model, hp.lr, self._fuses_optimizer)
        self._set_rates(optimizer, step=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._lr_factor), "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = self._has_begun = True

    def on_train_start(self) -> None:
        """Let this run's arguments replace those that a checkpoint of another run has restored."""
        self._batches.clear()  # of an interrupted step
        if self.trainer.max_steps < 1 and self._epoch_steps is None:
            self._count_steps_of_epochs()  # now that the data is where the checkpoint left it
        scheduler = self.lr_schedulers()
        if self._restored and isinstance(scheduler, LambdaLR):  # a learning-rate finder has its own scheduler
            self._restored = False
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, Optimizer)  # from `configure_optimizers`
            self._set_rates(optimizer, scheduler.last_epoch)
            scheduler.base_lrs = [self.hparams.lr] * len(scheduler.base_lrs)

    @property
    def _auxiliary_parameters(self) -> list[nn.Parameter]:
        """Parameters that only auxiliary losses of mixers train."""
        return [mixer.get_parameter(name) for mixer in self.model.mixers for name in mixer.auxiliary_parameters]

    @property
    def _batches_in_step(self) -> int:
        """The number of batches by which Lightning and DDP divide the gradients of a step."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    @property
    def _fuses_optimizer(self) -> bool | None:
        """Whether AdamW is one kernel; with 16-mixed it cannot be, as the scaler must act before gradient clipping."""
        return True if self.device.type == "cuda" and self.trainer.precision != "16-mixed" else None

    def _set_rates(self, optimizer: Optimizer, step: int) -> None:
        hp = self.hparams
        rates = {"initial_lr": hp.lr, "lr": hp.lr * self._lr_factor(step)}
        for group in optimizer.param_groups:
            group.update(rates, weight_decay=hp.weight_decay)
            if "betas" in group:  # Muon has none
                group["betas"] = tuple(hp.betas)
        optimizer.param_groups[-1]["weight_decay"] = 0.0

    def _lr_factor(self, step: int) -> float:
        hp, steps = self.hparams, self.trainer.max_steps
        if steps < 1 and hp.schedule != "constant":
            if self._epoch_steps is None:
                return 1.0  # in a resumed run, until `on_train_start` counts the steps
            steps = self._epoch_steps
        return lr_factor(hp.schedule, step, steps, hp.warmup_fraction, hp.decay_fraction)

    def _count_steps_of_epochs(self) -> None:
        if self.hparams.schedule == "constant":
            return
        self._epoch_steps = total_steps(self.trainer)
        if self._epoch_steps is None:
            raise ValueError(
                f"schedule {self.hparams.schedule!r}: expected a run whose steps can be counted, by trainer.max_steps, "
                f"or by trainer.max_epochs and data of a known length, got max_steps {self.trainer.max_steps} and "
                f"max_epochs {self.trainer.max_epochs}; set trainer.max_steps, or schedule to constant"
            )

    def _scores(self, batch: Batch, predict: bool = False) -> TokenScores:
        """The loss of each label, and the likeliest tokens if `predict`."""
        if self.hparams.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # without gradients each layer would otherwise be its own step
        if self.hparams.loss_chunk is not None:
            return self.model.scores(batch, self.hparams.loss_chunk, predict, self._token_losses)
        logits = self.model(batch["input_ids"], batch.get("documents"), batch.get("padding"))
        return TokenScores(self._token_losses(logits, batch["labels"]), logits.argmax(-1) if predict else None)

    def _loss(self, batch: Batch) -> tuple[Tensor, StepTotals]:
        """Mean loss over the labels of a batch, and sums over labels, detached.

        If processes divide sequences, the loss is this part's share of the mean over all parts.
        """
        totals = _totals(self._scores(batch).losses, batch)
        self._batch_labels = totals.labels
        if self.model.context is not None:
            self._batch_labels = self.model.context.gather([totals.labels])[0].sum(0)
        mean = totals.nats / self._batch_labels.clamp(min=1)
        return mean, replace(totals, nats=totals.nats.detach())

    def _evaluate(self, batch: Batch, split: Literal["val", "test"], metrics: EvaluationMetrics) -> Tensor:
        """Add a batch to metrics; returns the losses of its labels `[B, N]`."""
        losses, tokens = self._scores(batch, predict=True)
        assert tokens is not None
        totals = _totals(losses, batch)
        for name, metric in metrics.add(batch, tokens, totals.nats, totals.labels):
            shown, attribute = name in ("loss", "bits_per_byte", "accuracy"), f"{split}_metrics.{name}"
            # Lightning looks for metrics only once, but `setup` makes new ones.
            self.log(f"{split}/{name}", metric, prog_bar=shown, metric_attribute=attribute)
        return losses


def _totals(losses: Tensor, batch: Batch) -> StepTotals:
    """Sums over the labels of a batch, given the loss of each `[B, N]`."""
    nats = losses.sum()
    labels = (batch["labels"] != IGNORE_INDEX).sum(dtype=nats.dtype)
    size = batch["label_bytes"].sum(dtype=nats.dtype) if "label_bytes" in batch else None
    return StepTotals(nats, labels, size)


@contextmanager
def _set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A context in which these parameters have no gradients."""
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None
    yield
    for parameter, gradient in gradients:
        parameter.grad = gradient
