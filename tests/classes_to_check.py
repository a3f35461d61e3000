"""Classes that are ported well, and classes with one mistake each."""

from dataclasses import dataclass, replace
from typing import Any

import sae_lens
import torch
from torch import nn

from scale_sae import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from scale_sae.seeds import generator


@dataclass
class Config(StandardTrainingSAEConfig):
    groups: int = 1


class Base(StandardTrainingSAE):
    cfg: Config


# ---- ported well


class Replicated(Base):
    """Parameters that are not per latent, used on both sides of the sum; drawn ones of both kinds."""

    replicated = Base.replicated | {"gain", "W_skip"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.gain = self.zeros(1, device=device)
        self.W_skip = self.zeros(cfg.d_in, cfg.d_in, device=device)
        self.W_more = self.zeros(self.n_local, cfg.d_in, device=device)

    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.draw_rows(self.W_more, seed, hookpoint, "W_more")
        draw = generator(seed, hookpoint, "W_skip")
        self.W_skip.copy_(torch.randn(self.W_skip.shape, generator=draw, dtype=torch.float64))

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        acts = self.shard.copy(self.gain) * output.feature_acts
        out = self.shard.sum(acts @ self.W_more) + step_input.sae_in @ self.W_skip.T
        loss = (out - step_input.target).square().sum(-1).mean()
        losses = output.losses | {"more": loss}
        metrics: dict[str, Any] = {"fired": lambda: self.shard.all_reduce(output.active_latents), "one": 1}
        return replace(output, loss=output.loss + loss, losses=losses, metrics=metrics)

    def process_state_dict_for_saving_inference(self, state_dict):
        for name in ("gain", "W_skip", "W_more"):
            del state_dict[name]


class Noisy(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        draw = generator("noise", len(x))
        noise = torch.rand(len(x), self.cfg.d_sae, generator=draw, dtype=torch.float64)[:, self.rows]
        return acts * noise.to(acts), hidden_pre


class TiedToWidth(Base):
    """Not made for the small width that the check takes first."""

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        if cfg.d_in % cfg.groups:
            raise ValueError("groups must divide d_in")


WIDTHS: list[int] = []


class Counted(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        WIDTHS.append(cfg.d_in)


class NoReleasedClass(Base):
    def get_activation_fn(self):
        return torch.nn.functional.gelu


class Fitted(BatchTopKTrainingSAE):
    cfg: BatchTopKTrainingSAEConfig


# ---- one mistake each


class SumOverLocal(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": feature_acts.sum(-1).mean()}


class SmallSumOverLocal(Base):
    """Its mistake is a part in 10⁶ of the loss."""

    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return 1e-6 * feature_acts.sum(-1).mean()


class LocalNorm(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        return acts / acts.norm(dim=-1, keepdim=True).clamp(min=1e-3), hidden_pre


class LocalPrefix(TopKTrainingSAE):
    cfg: TopKTrainingSAEConfig

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        acts = self.activation_fn(output.hidden_pre[:, :6])
        loss = (self.decode(acts, slice(0, 6)) - step_input.target).square().sum(-1).mean()
        output.losses["inner"] = loss
        output.loss = output.loss + loss
        return output


class LocalMetric(Base):
    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        output.metrics["mean_act"] = output.feature_acts.sum()
        return output


class SkipsEmpty(Base):
    """Makes a call on those shards alone that have latents of the prefix."""

    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        inner = self.shard.prefix(6)
        if inner.stop == 0:
            return {"inner": sae_out.sum() * 0}
        return {"inner": self.shard.sum(feature_acts[:, inner].sum(-1)).mean()}


class CallsWhenOthersAreDone(Base):
    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        output.metrics["mean"] = self.mean
        return output

    def mean(self):
        return (self.shard.all_reduce(self.b_dec) if self.rows.start > 0 else self.b_dec).mean()


class PastTheShard(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        total = feature_acts.sum()
        torch.distributed.all_reduce(total, group=self.shard.group)
        return {"l1_loss": total}


class Gain(Base):
    replicated = Base.replicated | {"gain"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.gain = self.zeros(1, device=device)

    def process_state_dict_for_saving_inference(self, state_dict):
        del state_dict["gain"]


class NoCopy(Gain):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.sum((self.gain * feature_acts).sum(-1)).mean()}


class CopyTooMuch(Gain):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.copy(self.gain).sum() * self.shard.sum(feature_acts.sum(-1)).mean()}


class NotNamed(Gain):
    replicated = Base.replicated


class ForgetsBase(Gain):
    replicated = frozenset({"gain"})


class FullSize(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_more = self.zeros(cfg.d_sae, device=device)


class RandomStart(Gain):
    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.gain.copy_(torch.randn(1))


class LocalStart(Base):
    """Draws a stream of its own on every shard, but the same rows."""

    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.b_enc.copy_(torch.rand(self.n_local, generator=generator(seed), dtype=torch.float64))


class Dropout(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        return nn.functional.dropout(acts), hidden_pre


class LocalBuffer(Base):
    seen: torch.Tensor
    replicated = Base.replicated | {"seen"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64, device=device))

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        self.seen += output.feature_acts.detach().sum()
        return output


class Narrows(Base):
    def decode(self, feature_acts, latents=slice(None)):
        return self.shard.sum((feature_acts @ self.W_dec[latents]).float()).double() + self.b_dec


class SaeLensOutput(Base):
    def training_forward_pass(self, step_input):
        ours = super().training_forward_pass(step_input)
        fields = ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses")
        return sae_lens.saes.sae.TrainStepOutput(**{name: getattr(ours, name) for name in fields})


class Returns(Base):
    def changes(self, output):
        return {}

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        return replace(output, **self.changes(output))


class NoOutput(Base):
    def training_forward_pass(self, step_input):
        super().training_forward_pass(step_input)


class LossPerRow(Returns):
    def changes(self, output):
        return {"loss": (output.sae_out - output.sae_in).square().sum(-1)}


class LossDetached(Returns):
    def changes(self, output):
        return {"loss": output.loss.detach()}


class LossesOfFloats(Returns):
    def changes(self, output):
        return {"losses": {"mse_loss": output.losses["mse_loss"].item()}}


class LossesAsTensor(Returns):
    def changes(self, output):
        return {"losses": output.loss}


class MetricPerLatent(Returns):
    def changes(self, output):
        return {"metrics": {"acts": output.feature_acts.mean(0)}}


class WholeActs(Returns):
    def changes(self, output):
        return {"feature_acts": torch.cat([output.feature_acts] * 2, dim=1)}


class RowOut(Returns):
    def changes(self, output):
        return {"sae_out": output.sae_out.sum(0)}


class NotFinite(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.sum((0 * feature_acts).sqrt().sum(-1)).mean()}


class Raises(Base):
    def encode_with_hidden_pre(self, x):
        return self.helper(x)

    def helper(self, x):
        raise IndexError("first\nsecond")  # HERE


class RaisesOnOneShard(Base):
    """The others are already waiting for it in decode."""

    def decode(self, feature_acts, latents=slice(None)):
        if self.shard.rank == 1:
            raise IndexError("only here")
        return super().decode(feature_acts, latents)


class LeavesOnOneShard(Base):
    def decode(self, feature_acts, latents=slice(None)):
        if self.shard.rank == 1:
            raise SystemExit(7)
        return super().decode(feature_acts, latents)


class RaisesBackward(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        acts = feature_acts * 1
        loss = acts.square().sum()
        acts.add_(1)
        return {"l1_loss": loss}


class DropsBias(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        del state_dict["b_enc"]


class KeepsMore(Gain):
    def process_state_dict_for_saving_inference(self, state_dict):
        pass


class ReleaseOfOtherShape(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["W_enc"] = state_dict["W_enc"].T


class ReleaseMixesLatents(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_enc"] = state_dict["b_enc"] - state_dict["b_enc"].mean()


class ReleaseDiffers(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["W_enc"] = 2 * state_dict["W_enc"]


class ReleasedDecoderDiffers(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_dec"] = 2 * state_dict["b_dec"]


class NeedsManyLatents(Base):
    """Cannot be made of a block of latents."""

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        if cfg.d_sae < 8:
            raise ValueError("too few latents")


class ForgetsToFold(Base):
    """A bias in the unit of the scaled input, that fold_activation_norm_scaling_factor leaves as it is."""

    replicated = Base.replicated | {"b_pre"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_pre = self.zeros(cfg.d_in, device=device)

    def process_sae_in(self, sae_in):
        return super().process_sae_in(sae_in) - self.shard.copy(self.b_pre)

    def encode_with_hidden_pre(self, x):
        hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        return self.activation_fn(hidden_pre), hidden_pre

    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_enc"] = state_dict["b_enc"] - state_dict.pop("b_pre") @ state_dict["W_enc"]


class OnCpu(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_more = self.zeros(self.n_local, device="cpu")
