"""The first steps of a tuning: from its history, each cross-attention layer learns to give what an IP-Adapter gives.

A new history means nothing to the UNet, and the noise loss says so only through the whole network and beneath the noise of
its target. An IP-Adapter of the same base has already learned what a layer must give for a picture. So the base draws with
the history's frames as references (algorithms.md, section 1), and every layer learns its output there:

sum over layers l of  |attn_l(x_l, H) - attn_l(x_l, R)|^2 / Var(attn_l(x_l, R))
                    + |D_l(H, H') - D_l(R, R')|^2 / |D_l(R, R')|^2,    D_l(A, B) = attn_l(x_l, A) - attn_l(x_l, B)

for the history H of a frame and the same frames R as references, and H', R' of another story: the second term is about what
references say, which is little beside what they all share. The inputs x_l are the teacher's: no gradient runs through the
UNet, which makes such a step cheaper than one of noise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastory.conditioning.context import Context
from fastory.conditioning.references import Group, References
from fastory.models.copies import unet_copy
from fastory.models.torch_model import StoryModel
from fastory.processors.projected import CrossAttentionLayers

DistillationTarget = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Layer -> what went in, what came out, and what would have for other references, (R, L, C) each."""


class Teacher:
    """The base and its IP-Adapter as they are before the tuning, weights shared, low-rank updates not."""

    def __init__(self, model: StoryModel, scale: float) -> None:
        """scale: the weight l of the references. Raises InputError where the base has no IP-Adapter."""
        self.null = model.null_reference().clone()  # one of inference mode could not meet autograd
        self.unet = unet_copy(model.unet).requires_grad_(False)
        self.layers = CrossAttentionLayers(self.unet, model.layers.key_weights, model.layers.value_weights)
        self.tokens_per_ref, self.scale = model.tokens_per_ref, scale

    @torch.no_grad()
    def target(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        captions: Tensor,
        references: Tensor,
        visible: Tensor,
        others: Tensor,
    ) -> DistillationTarget:
        """What the cross-attentions of one call take and give.

        noisy (R, c, h, w), captions (R, Lt, C_x), references (n, T, C_x); visible (R, n + 1) bool, whether a row sees
        a reference, and last the null reference; others: the same for another story.
        """
        text = self.layers.project_text(captions)
        shared = References.of(
            [Group([reference[None] for reference in references], self.scale, lambda frame, n: True)],
            lambda: self.null.to(references),
            self.layers.project_references,
            tokens_per_ref=self.tokens_per_ref,
            like=text,
        )
        context = replace(shared.context(len(text)), text_kv=text, ref_visible=visible, ref_ranges=None)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            layer.attn.register_forward_hook(
                lambda _, inputs, output, name=layer.name: seen.update({name: (inputs[0], output)})
            )
            for layer in self.layers.layers
        ]
        try:
            self.unet(
                noisy,
                timesteps,
                encoder_hidden_states=None,
                cross_attention_kwargs={"context": context},
                return_dict=False,
            )
        finally:
            for hook in hooks:
                hook.remove()
        another = replace(context, ref_visible=others)
        return {
            layer.name: (*seen[layer.name], layer.attn(seen[layer.name][0], context=another))
            for layer in self.layers.layers
        }


def difference(
    layers: CrossAttentionLayers, target: DistillationTarget, context: Context, another: Context
) -> Tensor:
    """How far the layers are from the target where they see `context`, and `another` in its place: 0 is equal.

    The sum of both shares of variance (see above), mean over the layers.
    """
    shares = []
    for layer in layers.layers:
        taken, *targets = target[layer.name]
        outputs = [layer.attn(taken, context=c).float() for c in (context, another)]
        wanted = [tensor.float() for tensor in targets]
        shares.append(nn.functional.mse_loss(outputs[0], wanted[0]) / wanted[0].var())
        change = wanted[0] - wanted[1]
        shares.append(
            nn.functional.mse_loss(outputs[0] - outputs[1], change) / change.square().mean().clamp(min=1e-12)
        )
    return 2 * torch.stack(shares).mean()
