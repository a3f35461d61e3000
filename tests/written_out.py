"""A training step of every architecture written out: dense, unsharded, with the slopes that plain autograd finds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saes_for_tests import D_IN, D_SAE, Case, Step, dead_mask, inputs, targets, weights, whole_step
from scale_sae.saes import training_config


@dataclass
class Norm:
    """Rows are ``(x - mean) / scale`` to the encoder."""

    mean: Any
    scale: Any

    @classmethod
    def of(cls, kind: str, x: Tensor) -> "Norm":
        if kind == "layer_norm":
            return cls(x.mean(1, keepdim=True), x.std(1, keepdim=True))
        return cls(0, x.norm(dim=1, keepdim=True) / D_IN**0.5 if kind == "constant_norm_rescale" else 1)


class Plain:
    """One step of ``case``; ``p`` holds its parameters."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case = case
        self.cfg = training_config(case.architecture, D_IN, case.all_options(dtype), "saes.0")
        names = {
            "standard": ["b_enc"],
            "gated": ["b_gate", "b_mag", "r_mag"],
            "jumprelu": ["b_enc", "threshold"],
        }.get(case.kind, ["b_enc"])
        skip = ["W_skip"] if "skip" in case.architecture else []
        whole = weights(case, dtype)
        self.p = {name: whole[name].requires_grad_() for name in ["W_enc_rows", "W_dec", "b_dec", *names, *skip]}
        self.x, self.target = inputs(dtype), targets(case, dtype)
        self.norm = Norm.of(self.cfg.normalize_activations, self.x)
        self.norms = self.p["W_dec"].norm(dim=1)
        eps = 1e-5 if self.cfg.normalize_activations == "layer_norm" else 0
        shift = self.p["b_dec"] if self.cfg.apply_b_dec_to_input else 0
        self.products = ((self.x - self.norm.mean) / (self.norm.scale + eps) - shift) @ self.p["W_enc_rows"].T
        self.dead = dead_mask(case.n_dead)

    def out(self, values: Tensor, width: int = D_SAE) -> Tensor:
        """The reconstruction of the first ``width`` latents."""
        decoded = (values[:, :width] @ self.p["W_dec"][:width] + self.p["b_dec"]) * self.norm.scale + self.norm.mean
        return decoded + self.x @ self.p["W_skip"].T if "W_skip" in self.p else decoded

    def error(self, output: Tensor) -> Tensor:
        return (output - self.target).square().sum(1).mean()

    def step(self) -> Step:
        kinds = {"standard": self.standard, "gated": self.gated, "jumprelu": self.jumprelu}
        values, acts, pre, losses = kinds.get(self.case.kind, self.topk)()
        output = self.out(values)
        losses = {"mse_loss": self.error(output), **losses}
        return whole_step(torch.stack(list(losses.values())).sum(), losses, output, acts, pre, self.p)

    def coefficient(self, name: str) -> float:
        steps = getattr(self.cfg, f"{name}_warm_up_steps")
        value: float = getattr(self.cfg, f"{name}_coefficient")
        return value * self.case.step / steps if self.case.step < steps else value

    def standard(self) -> tuple[Tensor, Tensor, Tensor, Step]:
        pre = self.products + self.p["b_enc"]
        acts = pre.relu()
        penalty = (acts * self.norms).norm(p=self.cfg.lp_norm, dim=1).mean()
        return acts, acts, pre, {"l1_loss": self.coefficient("l1") * penalty}

    def gated(self) -> tuple[Tensor, Tensor, Tensor, Step]:
        gate = self.products + self.p["b_gate"]
        magnitude = self.products * self.p["r_mag"].exp() + self.p["b_mag"]
        acts = (gate > 0) * magnitude.relu()
        penalty = (gate.relu() * self.norms).sum(1).mean()
        error = self.error(self.out(gate.relu()))
        return (
            acts,
            acts,
            magnitude,
            {"l1_loss": self.coefficient("l1") * penalty, "auxiliary_reconstruction_loss": error},
        )

    def jumprelu(self) -> tuple[Tensor, Tensor, Tensor, Step]:
        cfg, pre, threshold = self.cfg, self.products + self.p["b_enc"], self.p["threshold"]
        threshold.data.clamp_(min=0)
        above = (pre > threshold).to(pre.dtype)
        near = ((pre - threshold).abs() < cfg.jumprelu_bandwidth / 2).to(pre.dtype) / cfg.jumprelu_bandwidth
        distance = (pre if cfg.jumprelu_ste_to_input else pre.detach()) - threshold
        slope = near.detach() * (distance - distance.detach())  # 0, with the estimators' gradients
        acts = pre * above + threshold.detach() * slope
        l0 = (above + slope).sum(1)
        sparsity = {
            "step": l0,
            "quadratic": 2 / (cfg.target_l0 or 1) * (l0 - (cfg.target_l0 or 1)) ** 2,
            "tanh": torch.tanh(cfg.jumprelu_tanh_scale * acts * self.norms).sum(1),
        }[cfg.jumprelu_sparsity_loss_mode]
        losses = {"l0_loss": self.coefficient("l0") * sparsity.mean()}
        if cfg.pre_act_loss_coefficient is not None:
            below = (threshold - pre).relu() * self.norms
            losses["pre_act_loss"] = cfg.pre_act_loss_coefficient * below[:, self.dead].sum(1).mean()
        return acts, acts, pre, losses

    def topk(self) -> tuple[Tensor, Tensor, Tensor, Step]:
        """Decoder norms rescale the activations, and are divided out again when they are decoded."""
        by = self.norms if self.cfg.rescale_acts_by_decoder_norm else torch.ones_like(self.norms)
        pre = (self.products + self.p["b_enc"]) * by
        if self.case.kind in ("topk", "abstopk"):
            size = pre.abs() if self.case.kind == "abstopk" else pre
            chosen = torch.zeros_like(pre).scatter(1, size.topk(self.cfg.k).indices, 1) * (size > 0)
        else:
            best = pre.flatten().topk(int(self.cfg.k * len(pre))).indices
            chosen = torch.zeros_like(pre).flatten().scatter(0, best, 1).view_as(pre) * (pre > 0)
        acts = pre * chosen
        values = acts / by
        widths = [*(w for w in getattr(self.cfg, "matryoshka_widths", []) if w < D_SAE), D_SAE]
        if getattr(self.cfg, "use_matryoshka_aux_loss", False):
            parts = list(zip([0, *widths], widths, strict=False))
        else:
            parts = [(0, D_SAE)]
        losses = {
            "auxiliary_reconstruction_loss": torch.stack([self.aux(pre, by, values, *part) for part in parts]).sum()
        }
        for width in widths[:-1]:
            losses[f"inner_mse_loss_{width}"] = self.error(self.out(values, width))
        return values, acts, pre, losses

    def aux(self, pre: Tensor, by: Tensor, values: Tensor, start: int, stop: int) -> Tensor:
        """The loss of the dead among latents ``start..stop``, of what the first ``stop`` latents leave over."""
        dead = self.dead.clone()
        dead[:start], dead[stop:] = False, False
        most = self.cfg.k_aux or self.case.d_out // 2
        residual = (self.target - self.out(values, stop)).detach()
        ranking = (pre.abs() if self.case.kind == "abstopk" else pre).masked_fill(~dead, -torch.inf)
        chosen = torch.zeros_like(pre).scatter(1, ranking.topk(min(most, int(dead.sum()))).indices, 1)
        recon = (pre * chosen / by) @ self.p["W_dec"] * self.norm.scale
        error = (recon - residual).square().sum(1).mean()
        return self.cfg.aux_loss_coefficient * min(int(dead.sum()) / most, 1) * error
