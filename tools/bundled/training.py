"""The training loop: bounded by the clock or by steps, logged, saved as safetensors, resumable."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .checkpoint import write_weights
from .network import Network
from .optimizer import Optimizer, schedule
from .rows import TOKENS_PER_BATCH, Rows, loss_weights

MTP_SHARE = 0.25
MTP_WEIGHT = 0.3
BALANCE_STEP = 0.004
BALANCE_UNTIL = 0.9
LATE_BATCHES = 2  # batches per step once small noisy steps no longer pay
LATE_FROM = 0.7
REPORT_EVERY = 25
SAVE_EVERY = 150


@dataclass(slots=True)
class Run:
    """How far a run has come; saved next to the weights and repeated in the model card."""

    seed: int
    warm_start: bool = False
    step: int = 0
    batch: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    mtp_loss: float = math.nan
    expert_load: float = math.nan

    @property
    def tokens(self) -> int:
        """Tokens trained on by the main model."""
        return self.batch * TOKENS_PER_BATCH


@dataclass(frozen=True, slots=True)
class Budget:
    """A run ends after `steps` when given, else after `minutes`; only the former repeats bit for bit."""

    minutes: float
    steps: int | None

    def progress(self, run: Run) -> float:
        """Share of the budget used, 0 to 1."""
        return run.step / self.steps if self.steps else run.seconds / (60 * self.minutes)


class Trainer:
    """Owns network, optimizer and run; writes state only into `out`."""

    def __init__(self, network: Network, rows: Rows, run: Run, held_out_BT: torch.Tensor, out: Path) -> None:
        self._network = network
        self._rows = rows
        self._run = run
        self._held_out_BT = held_out_BT
        self._out = out
        self._optimizer = Optimizer(network)

    def train(self, budget: Budget) -> Run:
        """Train until the budget is used, saving every SAVE_EVERY steps and at the end."""
        self._network.train()
        began = time.monotonic() - self._run.seconds
        while (progress := budget.progress(self._run)) < 1:
            self._step(progress)
            self._run.seconds = time.monotonic() - began
            if self._run.step % REPORT_EVERY == 0:
                print(self._report(progress), flush=True)
            if self._run.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        return self._run

    def save(self) -> None:
        """Write bf16 weights, the exact state for resuming and the run; each file replaces its predecessor whole."""
        self._out.mkdir(parents=True, exist_ok=True)
        print(f"step {self._run.step} held-out loss by 128 positions: {self._position_losses()}", flush=True)
        state = {f"network.{name}": tensor for name, tensor in self._network.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state().items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, self._out / "state.part")
        write_weights(self._network.state_dict(), self._out / "model.part")
        (self._out / "run.part").write_text(json.dumps(asdict(self._run)))
        for part, name in (("state", "state.safetensors"), ("model", "model.safetensors"), ("run", "run.json")):
            (self._out / f"{part}.part").rename(self._out / name)

    def resume(self) -> None:
        """Go on from what `save` wrote."""
        state = load_file(self._out / "state.safetensors")
        for prefix, load in (("network.", self._network.load_state_dict), ("optimizer.", self._optimizer.restore)):
            load({name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)})
        for name, value in json.loads((self._out / "run.json").read_text()).items():
            setattr(self._run, name, value)

    def _step(self, progress: float) -> None:
        run = self._run
        batches = LATE_BATCHES if progress >= LATE_FROM else 1
        for _ in range(batches):
            ids_BT = self._rows.batch(run.batch, progress).to(self._network.norm.device)
            losses = self._network.losses(ids_BT, loss_weights(ids_BT), mtp_rows=int(len(ids_BT) * MTP_SHARE))
            assert losses.mtp is not None, "every batch has at least one row for the MTP layer"
            ((losses.main + MTP_WEIGHT * losses.mtp) / batches).backward()
            run.batch += 1
        scale = schedule(run.step, progress)
        self._optimizer.step(scale)
        balance = BALANCE_STEP * scale if progress < BALANCE_UNTIL else 0.0
        run.expert_load = max(router.balance(balance) for router in self._network.routers())
        run.train_loss = _smoothed(run.train_loss, losses.main.item())
        run.mtp_loss = _smoothed(run.mtp_loss, losses.mtp.item())
        run.step += 1

    def _report(self, progress: float) -> str:
        run = self._run
        return (
            f"step {run.step} progress {progress:.3f} minutes {run.seconds / 60:.1f} loss {run.train_loss:.3f} "
            f"mtp {run.mtp_loss:.3f} load {run.expert_load:.2f} tokens {run.tokens / 1e6:.2f}M "
            f"rate {run.tokens / run.seconds:.0f}/s"
        )

    def _position_losses(self) -> str:
        self._network.eval()
        bins = position_losses(self._network, self._held_out_BT, width=128)
        self._network.train()
        return f"{' '.join(f'{loss:.3f}' for loss in bins)} (mean {sum(bins) / len(bins):.3f})"


@torch.no_grad()
def position_losses(network: Network, ids_BT: torch.Tensor, *, width: int) -> list[float]:
    """Mean next-token loss in nats for each run of `width` positions."""
    ids_BT = ids_BT.to(network.norm.device)
    losses = []
    for row_1T in ids_BT.split(1):
        logits = network.logits(row_1T[:, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, row_1T[0, 1:], reduction="none"))
    return [part.mean().item() for part in torch.stack(losses).split(width, 1) if part.shape[1] == width]


def _smoothed(average: float, value: float) -> float:
    return value if math.isnan(average) else 0.97 * average + 0.03 * value
