"""Pretrains the bundled tiny vision transformer: python pretrain.py [STEPS] (PyTorch, safetensors).

Its data are made from a seed: one of eight kinds of objects, none of which is a class of `trefoil adapter --synthetic`, at
random places, sizes, angles and colours. The backbone learns to tell kind, place, size and colour.
"""

import json
import math
import sys

import torch
from safetensors.torch import save_file
from torch import nn

IMAGE, PATCH, HIDDEN, LAYERS, HEADS, MLP = 32, 8, 64, 4, 4, 128
SIDE = IMAGE // PATCH
torch.manual_seed(5)
torch.set_num_threads(1)


def batch(n):
    """Images `[n, 3, IMAGE, IMAGE]` from -1 to 1, and four labels each."""
    axis = (torch.arange(IMAGE) + 0.5) / IMAGE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rand = lambda *shape: torch.rand(n, *shape)
    kind = torch.randint(8, (n,))
    cx, cy, radius, angle = (
        0.25 + 0.5 * rand(1, 1),
        0.25 + 0.5 * rand(1, 1),
        0.15 + 0.15 * rand(1, 1),
        rand(1, 1) * 2 * math.pi,
    )
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    rr, au, av = u * u + v * v, u.abs(), v.abs()
    masks = torch.stack(
        [
            u**2 + (v / 0.5) ** 2 < 1,  # ellipse
            (au < 1) & (av < 0.3),  # bar
            (rr < 1) & (v > 0),  # half a disc
            ((u + 0.6).abs() < 0.35) & (av < 1) | ((v - 0.65).abs() < 0.35) & (au < 1),  # L
            (au < 0.3) & (av < 1) | ((v - 0.7).abs() < 0.3) & (au < 1),  # T
            (au - 0.6) ** 2 + v**2 < 0.16,  # two dots
            (torch.maximum(au, av) < 1) & (torch.maximum(au, av) > 0.6),  # frame
            (rr < 1) & ((6 * u).sin() > 0) & (v > -0.2),  # part of a grid
        ]
    )
    mask = masks[kind, torch.arange(n)].float()[:, None]
    hue = rand(1) * 2 * math.pi
    shift = torch.tensor([0.0, 2.0943951, 4.1887902])
    front = 0.55 * torch.cos(hue - shift)[:, :, None, None]
    slope = 0.3 * (rand(3, 1, 1) - 0.5) * x + 0.3 * (rand(3, 1, 1) - 0.5) * y
    back = -front * (0.3 + 0.5 * rand(1, 1, 1)) + 0.4 * (rand(3, 1, 1) - 0.5) + slope
    image = back + mask * (front + 0.1 - back) + 0.1 * torch.randn(n, 3, IMAGE, IMAGE)
    third = lambda c: ((c - 0.25) * 6).long().clamp(0, 2).flatten()
    place = 3 * third(cy) + third(cx)
    size = ((radius - 0.15) / 0.05).long().clamp(0, 2).flatten()
    colour = (hue / (2 * math.pi) * 6).long().clamp(0, 5).flatten()
    return image.clamp(-1, 1), (kind, place, size, colour)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.layernorm_after = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.query, self.key, self.value, self.attended = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.intermediate, self.output = nn.Linear(HIDDEN, MLP), nn.Linear(MLP, HIDDEN)

    def forward(self, h):
        x = self.layernorm_before(h)
        heads = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)
        q, k, v = (heads(part(x)) for part in (self.query, self.key, self.value))
        context = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        h = h + self.attended(context.transpose(1, 2).reshape(h.shape))
        return h + self.output(nn.functional.gelu(self.intermediate(self.layernorm_after(h))))


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, HIDDEN, PATCH, PATCH)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, HIDDEN))
        self.position_embeddings = nn.Parameter(0.1 * torch.randn(1, SIDE * SIDE + 1, HIDDEN))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.ln = nn.LayerNorm(HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, n) for n in (8, 9, 3, 6))

    def forward(self, image):
        patches = self.projection(image).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(image), 1, HIDDEN), patches], 1) + self.position_embeddings
        for layer in self.layers:
            h = layer(h)
        cls = self.ln(h[:, 0])
        return [head(cls) for head in self.heads]

    def tensors(self):
        """As Hugging Face's ViTModel names them."""
        names = {
            "projection": "embeddings.patch_embeddings.projection",
            "cls_token": "embeddings.cls_token",
            "position_embeddings": "embeddings.position_embeddings",
            "query": "attention.attention.query",
            "key": "attention.attention.key",
            "value": "attention.attention.value",
            "attended": "attention.output.dense",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
        }
        out = {}
        for name, value in self.state_dict().items():
            if name.startswith(("ln.", "heads.")):
                continue
            parts = name.split(".")
            if parts[0] == "layers":
                part = names.get(parts[2], parts[2])
                name = ".".join(["encoder.layer", parts[1], part, *parts[3:]])
            else:
                name = ".".join([names[parts[0]], *parts[1:]])
            out[name] = value.contiguous()
        return out


def main():
    steps, peak = int(sys.argv[1]) if len(sys.argv) > 1 else 4000, 2e-3
    vit = Vit()
    optimiser = torch.optim.AdamW(vit.parameters(), lr=peak, weight_decay=0.05)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        image, labels = batch(64)
        out = vit(image)
        loss = sum(w * nn.functional.cross_entropy(o, l) for w, o, l in zip((2, 1, 0.5, 0.5), out, labels))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            right = [(o.argmax(1) == l).float().mean().item() for o, l in zip(out, labels)]
            print(f"{step + 1} steps, loss {loss.item():.3f}, right (kind, place, size, colour): {right}", flush=True)
    save_file(vit.tensors(), "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "vit",
        "image_size": IMAGE,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
    with open("config.json", "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


main()
