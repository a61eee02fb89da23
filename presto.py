# SPDX-License-Identifier: MIT
"""Presto! in one file: distilling a diffusion model's steps and layers, on tones you can check.

    python presto.py train                  VAE -> teacher -> Presto-L -> Presto-S -> Presto-LS
    python presto.py sample --steps 4       hear what Presto-LS learnt
    python presto.py eval                   measure all of them, and draw what happened

An unofficial, minimal, educational implementation of "Presto! Distilling Steps and Layers for
Accelerating Music Generation" (Novack et al., ICLR 2025, arXiv 2410.05167), whose authors released
no code. Where the public record of the paper is silent, a comment says "our reading". What is not
in the paper at all is tagged "ours"; the data, the VAE and the measures are all ours.

READING ORDER (it is also the order of execution)
    Part 0  Config      every setting
    Part 1  VAE         waveform <-> latents                           Kingma & Welling 2014
    Part 2  DiT         the network, with blocks that can be skipped   Peebles & Xie 2023
    Part 3  EDM         noise, preconditioning, guidance, sampler      Karras et al. 2022
    Part 4  Teacher     the training loop, and the loss of a denoiser
    Part 5  Presto-L    fewer layers: ASE, and what Presto! changes    Moon et al. 2024
    Part 6  Presto-S    fewer steps: DMD2 for continuous sigma         Yin et al. 2024
            Presto-LS   both: the same loop, started from Presto-L
    Part 7  Generating and measuring. (Part 8: runs and command line, no lesson here)

THE LOOP OF PRESTO-S (the paper's Figure 1; the same numbers stand at the lines of Part 6)
    x_real --(1)--> [generator] --(2)--> x_gen --+--(3)--> [real_score], [fake_score] --(4)--> DMD
                                                 +--(5)--> [fake_score] --(6)--> DSM
                                   x_gen, x_real +--(7)--> [half of fake_score, head] --(8)--> GAN

    1  Real latents are noised, at a level drawn from the distribution p_gen.
    2  The generator denoises them in one call. Its answer x_gen should look like a real latent.
    3  x_gen is noised again, because denoisers know only noised latents. The level is drawn from
       p_dmd: much noise leaves only coarse features to compare; little noise leaves details, too.
    4  Two denoisers look at it. real_score, the teacher, knows the real data; fake_score knows what
       the generator makes. The difference of their answers is the direction to real data.
    5  x_gen is noised, at a level drawn from p_dsm.
    6  fake_score learns to denoise it. If fake_score lags, step 4 judges an older generator.
    7  x_gen and x_real are noised, for the reasons given at 3, at a level drawn from p_gan.
    8  The lower half of fake_score, with head, learns to tell them apart.
    In a round, fake_score and head learn five times (steps 1, 2, 5 to 8). Then the generator learns
    once. In 1 to 4 it follows that direction; in 7 and 8, without x_real, it tries to deceive the
    head. Ours, mainly: anchor_loss; tell_level (train_student); p_gan "low" (draw_sigma); and
    `parallel` (guided). To undo: --anchor 0 --tell_level false --p_gan train --parallel 1

DMD: distribution matching distillation; DMD2 adds the GAN. DSM: denoising score matching, the usual
loss of a denoiser. ASE: adaptive score estimation, that is fewer blocks where noise is high.

SYMBOLS (the paper's name, then the name in this file)
    x_real          x_real          a latent from the VAE, scaled to standard deviation sigma_data
    e, null         label, null     the condition: text in the paper, a class of tones here
    sigma, epsilon  sigma, noise    x_real + sigma * noise is the noisy input; noise is Gaussian
    mu_theta        real_score      the frozen teacher
    mu_psi          fake_score      a denoiser that learns what the generator makes
    G_phi           generator       the few-step student
    D_psi           head            the discriminator's head, on fake_score's half-way features
    p_gen, p_DMD,   p_gen, p_dmd,   from where the noise levels of steps 1, 3, 5 and 7 are drawn:
    p_DSM, p_GAN    p_dsm, p_gan    each is set separately, in the paper to "train" or "inf":
    p(sigma^train)  "train"         noise levels as in the training of the teacher
    p(sigma^inf)    "inf"           noise levels of inference: all levels that students may visit
"""

import argparse
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import pathlib
import sys
import time
import zipfile
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import toy_data

# ---- Part 0. Config ------------------------------------------------------------------------------
STAGES = ["vae", "teacher", "presto-l", "presto-s", "presto-ls"]  # in order of training
NOISE = ["train", "inf"]  # see draw_sigma

class UserError(Exception):
    """Something that the user can put right: one line on stderr, and exit status 2."""

def setting(stage, default, help, choices=None):
    """A field of Config. `stage` is the first stage to train again if this setting changes."""
    metadata = {"stage": STAGES.index(stage), "help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)

@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. Skim them: the code that uses one explains it. Defaults: the preset `cpu`."""
    data: str = setting("vae", "toy_data", "the module that makes the clips (toy_data's contract)")
    stride: int = setting("vae", 512, "samples per latent frame: 16 frames per clip")
    latent_channels: int = setting("vae", 12, "channels of a latent frame")
    vae_width: int = setting("vae", 128, "channels inside the VAE")
    vae_blocks: int = setting("vae", 4, "residual blocks of encoder and decoder each")
    kl_weight: float = setting("vae", 4e-3, "KL: too low, fragile latents; too high, inexact VAE")
    vae_updates: int = setting("vae", 3000, "updates of the VAE")
    vae_batch: int = setting("vae", 16, "clips per update; few, so that updates are cheap")
    vae_lr: float = setting("vae", 1e-3, "learning rate of the VAE")
    sigma_data: float = setting("vae", 0.5, "standard deviation of the latents (EDM)")
    width: int = setting("teacher", 128, "channels of a token")
    depth: int = setting("teacher", 8, "blocks (paper: 28)")
    num_heads: int = setting("teacher", 4, "attention heads")
    P_mean: float = setting("teacher", -0.3, "mean of ln sigma in training (EDM: -1.2, for images)")
    P_std: float = setting("teacher", 1.4, "standard deviation of ln sigma in training (EDM: 1.2)")
    clips: int = setting("teacher", 16384, "real clips, encoded once: the training set")
    wrong_captions: float = setting("teacher", 0.18, "share of wrong captions (see train_denoiser)")
    teacher_updates: int = setting("teacher", 3000, "updates of the teacher")
    batch: int = setting("teacher", 32, "clips per update of teacher and Presto-L")
    teacher_lr: float = setting("teacher", 1e-3, "learning rate of the teacher")
    ema: float = setting("teacher", 0.998, "decay of the teacher's averaged weights")
    label_dropout: float = setting("teacher", 0.1, "share of null labels, which guidance needs")
    sigma_min: float = setting("presto-l", 0.002, "lowest noise level (EDM)")
    sigma_max: float = setting("presto-l", 80.0, "highest noise level (EDM)")
    rho: float = setting("presto-l", 7.0, "larger: smaller steps at low noise (EDM)")
    fractions: tuple = setting("presto-l", (1, 1, 0.88, 0.88, 0.75, 0.75, 0.63, 0.63, 0.63, 0.63),
                               "shares of blocks that run, from clean to noisy (see budget_at)")
    keep_last: bool = setting("presto-l", True, "shifted dropping: the last block always runs")
    budget_embedding: bool = setting("presto-l", True, "tell the network how many blocks will run")
    self_teacher: float = setting("presto-l", 1.0, "weight of L_st (see layer_loss)")
    layer_updates: int = setting("presto-l", 400, "updates of Presto-L")
    layer_lr: float = setting("presto-l", 3e-4, "learning rate of Presto-L (ASE: 1e-5)")
    student_ema: float = setting("presto-l", 0.98, "decay of the students' averaged weights")
    w: float = setting("presto-s", 1.5, "guidance of teacher, Presto-L, and DMD's real score")
    parallel: float = setting("presto-s", 0.1, "share kept of guidance along mu (see guided)")
    teacher_steps: int = setting("presto-s", 16, "sampling steps of teacher and Presto-L")
    u_end: float = setting("presto-s", 0.8, "where the students' levels end (see student_sigmas)")
    p_gen: str = setting("presto-s", "inf", "noise on the generator's input", [*NOISE, "discrete"])
    p_dmd: str = setting("presto-s", "train", "noise under which the scores are compared", NOISE)
    p_dsm: str = setting("presto-s", "train", "noise under which the fake score learns", NOISE)
    p_gan: str = setting("presto-s", "low", "noise for the head (paper: train)", [*NOISE, "low"])
    nu1: float = setting("presto-s", 0.3, "weight of the GAN term for the generator (paper: 0.01)")
    nu2: float = setting("presto-s", 0.15, "weight of the GAN term for the head (paper: 0.005)")
    tell_level: bool = setting("presto-s", True, "tell the fake score the generator's sigma (ours)")
    warm_updates: int = setting("presto-s", 100, "fake-score updates before the generator's first")
    fake_updates: int = setting("presto-s", 5, "fake-score updates per generator update (paper: 5)")
    student_batch: int = setting("presto-s", 16, "clips per update of Presto-S and -LS")
    student_updates: int = setting("presto-s", 900, "updates of the generator")
    anchor: float = setting("presto-s", 120.0, "weight of anchor_loss (ours)")
    generator_lr: float = setting("presto-s", 2e-4, "learning rate of the generator (paper: 5e-7)")
    fake_lr: float = setting("presto-s", 4e-4, "rate of fake score and head: constant, to keep up")
    fractions_ls: tuple = setting("presto-ls", (1, 1, 1, 1, 0.88, 0.75, 0.75, 0.63, 0.63, 0.63),
                                  "like fractions, milder: few calls must do more (our reading)")
    ls_start: str = setting("presto-ls", "presto-l", "generator's start (our reading)", STAGES[2:4])
    full_scores: bool = setting("presto-ls", True, "both scores keep full depth (our reading)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, is_int = field.name, getattr(self, field.name), field.type is int
            low = {"P_mean": -100, "rho": 1, "sigma_data": 0.01}.get(name, 1 if is_int else 0)
            high = 1 if name in ("ema", "student_ema", "u_end") else 10**9
            if (is_int or field.type is float) and not low <= value <= high:
                raise UserError(f"--{name} {value}: must be a number from {low} to {high}")
        if self.width % 4 or self.width % self.num_heads or self.depth < 2:
            raise UserError("--width must be a multiple of 4 and of --num_heads, --depth 2 or more")
        if self.stride % 2 or self.world.CLIP_SAMPLES % self.stride or self.frames < 8:
            raise UserError("--stride must be even, and cut a clip into 8 whole frames or more")

    @property
    def world(self):  # the data module: toy_data, or another that keeps its contract
        return importlib.import_module(self.data)
    @property
    def frames(self):  # latent frames per clip
        return self.world.CLIP_SAMPLES // self.stride
    @property
    def null(self):  # the null label: one past the last class
        return len(self.world.PROMPTS)

PRESETS = {
    "cpu": {},
    "gpu": {"vae_width": 384, "vae_updates": 20000, "vae_batch": 64, "width": 384, "depth": 12,
            "num_heads": 6, "clips": 65536, "teacher_updates": 20000, "batch": 256, "ema": 0.9995,
            "teacher_lr": 5e-4, "layer_updates": 4000, "student_batch": 64},
    "tiny": {"latent_channels": 4, "vae_width": 16, "vae_blocks": 1, "vae_updates": 4, "clips": 64,
             "width": 16, "depth": 4, "batch": 8, "student_batch": 4, "teacher_updates": 4,
             "layer_updates": 3, "student_updates": 2, "warm_updates": 2, "teacher_steps": 4},
}

# ---- Part 1. VAE: waveform <-> latents -----------------------------------------------------------
def zero_init(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResidualBlock(nn.Module):
    """h + out(a * silu(b)), where a and b are two convolutions of norm(h) (Shazeer 2020). A tone
    is amplitude times harmonics times envelope: a block that can multiply learns it faster."""
    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.conv = nn.Linear(3 * width, 2 * width)  # a conv over 3 frames; faster than Conv1d
        self.out = zero_init(nn.Linear(width, width))  # at first, the block is the identity

    def forward(self, h):  # (batch, frames, width)
        padded = F.pad(self.norm(h), (0, 0, 1, 1))  # (batch, frames + 2, width)
        neighbours = padded.unfold(1, 3, 1).flatten(2)  # (batch, frames, width, 3), flattened
        a, b = self.conv(neighbours).chunk(2, dim=-1)  # (batch, frames, width) each
        return h + self.out(a * F.silu(b))

class VAE(nn.Module):
    """A 1-D convolutional VAE. Latents are far fewer numbers than samples: cheap to denoise."""
    def __init__(self, cfg):
        super().__init__()
        w, s, c, n = cfg.vae_width, cfg.stride, cfg.latent_channels, cfg.vae_blocks
        self.cut = nn.Conv1d(1, w, 2 * s, s, padding=s // 2)  # waveform -> overlapping frames
        self.encoder = nn.Sequential(*[ResidualBlock(w) for _ in range(n)], nn.Linear(w, 2 * c))
        self.decoder = nn.Sequential(nn.Linear(c, w), *[ResidualBlock(w) for _ in range(n)])
        self.join = nn.ConvTranspose1d(w, 1, 2 * s, s, padding=s // 2)  # frames -> waveform
        # train_vae measures these at its end: latents have mean 0, std sigma_data (for Denoiser).
        self.register_buffer("mean", torch.zeros(cfg.latent_channels, 1))
        self.register_buffer("scale", torch.ones(cfg.latent_channels, 1))

    def posterior(self, wave):  # (batch, time)
        h = self.cut(wave[:, None]).mT  # (batch, frames, width)
        mean, log_std = self.encoder(h).mT.chunk(2, dim=1)
        return mean, log_std.clamp(-10, 3)  # (batch, channels, frames) each

    def encode(self, wave):  # (batch, time)
        mean, _ = self.posterior(wave)  # no noise: noise is only to train the decoder
        return (mean - self.mean) / self.scale  # (batch, channels, frames)

    def decode(self, latents):  # (batch, channels, frames)
        h = self.decoder((latents * self.scale + self.mean).mT)  # (batch, frames, width)
        return self.join(h.mT)[:, 0]  # (batch, time)

SILENCE = 1e-2  # the least energy to divide by: the relative error of a silent clip stays finite
def stft_distance(output, wave):
    """Relative squared distance of magnitude spectra at two resolutions: (batch, time) -> scalar.
    It forgives errors of phase. Ears forgive small ones; vae_loss's other term sees large ones."""
    total = 0.0
    for n in (1024, 256):  # a long window tells pitches apart, a short one moments
        window = torch.hann_window(n, device=wave.device)
        A = torch.stft(output, n, n // 2, window=window, return_complex=True).abs()
        B = torch.stft(wave, n, n // 2, window=window, return_complex=True).abs()
        energy = B.square().sum((1, 2)).clamp_min(n * SILENCE)  # (batch,); energy grows with n
        total = total + ((A - B).square().sum((1, 2)) / energy).mean() / 2
    return total

def vae_loss(vae, wave, cfg):
    """Relative waveform error + STFT distance + KL to the unit Gaussian. Returns (loss, error).
    "Relative" to each clip's energy: a quiet clip counts as much as a loud one. Noise on latents
    teaches the decoder to bear inexact latents. Without KL, the encoder would make the noise 0."""
    mean, log_std = vae.posterior(wave)
    latents = mean + log_std.exp() * torch.randn_like(mean)  # (batch, channels, frames)
    output = vae.decode((latents - vae.mean) / vae.scale)  # as decode expects
    energy = wave.square().sum(1).clamp_min(SILENCE)  # (batch,)
    error = ((output - wave).square().sum(1) / energy).mean()
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).mean()
    return error + 0.2 * stft_distance(output, wave) + cfg.kl_weight * kl, error

# ---- Part 2. DiT: the network, with blocks that can be skipped -----------------------------------
class Block(nn.Module):
    """An adaLN-Zero block (DiT, section 3.2). The condition c sets shift, scale, gate of attention
    and MLP. Gates start at zero: a block begins as the identity, and deep stacks train stably."""
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)  # has no weights
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.adaln = zero_init(nn.Linear(width, 6 * width))

    def forward(self, h, c):  # (batch, frames, width), (batch, width)
        modulation = self.adaln(c)[:, None].chunk(6, dim=-1)  # six times (batch, 1, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = self.qkv(self.norm(h) * (1 + scale1) + shift1)  # (batch, frames, 3 * width)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, num_heads, frames, width / num_heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1 * self.out(attended)  # (batch, frames, width)
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)

class LevelEmbedding(nn.Module):
    """c_noise = ln(sigma) / 4 (batch,) -> conditioning (batch, width), by Fourier features: an MLP
    hardly sees small steps of one number. Slow and fast waves of the number show them."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, width // 2))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise):
        angles = c_noise[:, None] * self.frequencies  # (batch or 1, width / 2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

class DiT(nn.Module):
    """F_theta, the network in Denoiser (Part 3): (c_in * x, c_noise, label) -> the shape of x. A
    block adds to h; if it is skipped, h passes on. `budget` says how many of the `depth` blocks
    run. None: all. An int: for the whole batch; the rest is skipped (sampling). A tensor
    (batch,): one per sample; all are computed, each sample keeps those of its budget (training)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.inp = nn.Linear(cfg.latent_channels, cfg.width)
        self.position = nn.Parameter(0.02 * torch.randn(cfg.frames, cfg.width))
        self.level = LevelEmbedding(cfg.width)
        self.gen_level = None  # a second LevelEmbedding, which only the fake score gets (Part 6)
        self.label_table = nn.Embedding(cfg.null + 1, cfg.width)  # the last row is the null label
        # Row cfg.depth stays zero (padding_idx): a full budget and None are the same network.
        self.budget_table = nn.Embedding(cfg.depth + 1, cfg.width, padding_idx=cfg.depth)
        nn.init.zeros_(self.budget_table.weight)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.num_heads) for _ in range(cfg.depth))
        self.final_norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.final_adaln = zero_init(nn.Linear(cfg.width, 2 * cfg.width))
        self.final_out = zero_init(nn.Linear(cfg.width, cfg.latent_channels))  # F starts at 0

    def is_active(self, index, budget):
        """Whether block `index` runs: a bool if budget is an int, booleans (batch,) if a tensor.
        Budget 3 of 8: ASE runs blocks 0, 1, 2; shifted dropping (Part 5) 0, 1, 7 (our reading)."""
        if budget is None:
            return True
        if self.cfg.keep_last:  # the last block, and before it the first ones
            return (index == self.cfg.depth - 1) | (index < budget - 1)
        return index < budget

    def forward(self, x, c_noise, label, budget=None, c_gen=None, return_features=False):
        c = self.level(c_noise) + self.label_table(label)  # (batch, width)
        if self.cfg.budget_embedding and budget is not None:
            c = c + self.budget_table(torch.as_tensor(budget, device=x.device).reshape(-1))
        if self.gen_level is not None:
            c = c + self.gen_level(c_gen)
        c = F.silu(c)
        h = self.inp(x.mT) + self.position  # (batch, frames, width)
        last = self.cfg.depth // 2 if return_features else self.cfg.depth
        for index, block in enumerate(self.blocks[:last]):
            active = self.is_active(index, budget)
            if torch.is_tensor(active):
                h = torch.where(active[:, None, None], block(h, c), h)
            elif active:
                h = block(h, c)
        if return_features:  # what the discriminator reads (paper: after block 14 of 28)
            return h
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)  # (batch, 1, width) each
        return self.final_out(self.final_norm(h) * (1 + scale) + shift).mT

# ---- Part 3. EDM: noise, preconditioning, guidance, sampler --------------------------------------
# THE CONTRACT. A denoiser is any callable  denoise(x, sigma, label) -> x0
#     x      noisy latents x0 + sigma * noise       (batch, channels, frames)
#     sigma  noise level                            () or (batch,)
#     label  class index, or cfg.null for none      (batch,)
#     x0     clean latents                          (batch, channels, frames)
# A teacher answers with E[x0 | x], the mean of all clean latents that x may come from: it has the
# least squared error. A generator answers with one of them. (The fake score is told more: Part 6.)
class Denoiser(nn.Module):
    """D = c_skip x + c_out F (EDM, equation 7). F is a DiT. Its input c_in x and its target
    (x0 - c_skip x) / c_out have variance 1 at every sigma. c_out shrinks F's error at low noise."""
    def __init__(self, cfg):
        super().__init__()
        self.sigma_data = cfg.sigma_data
        self.net = DiT(cfg)

    def forward(self, x, sigma, label, budget=None, sigma_gen=None, return_features=False):
        sigma = sigma.reshape(-1, 1, 1)  # a scalar broadcasts
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)  # 1 to 0; at sigma 0, D is x
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()  # 0 to sigma_data
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()  # c_in * x has variance 1
        c_noise = sigma.flatten().log() / 4
        c_gen = None if sigma_gen is None else sigma_gen.log() / 4
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            F_x = self.net(c_in * x, c_noise, label, budget, c_gen, return_features).float()
        return F_x if return_features else c_skip * x + c_out * F_x  # at high sigma: c_out F

def rho_schedule(u, cfg):
    """EDM's equation 5, made continuous: u in [0, 1] -> sigma, from sigma_max to sigma_min."""
    high, low = cfg.sigma_max ** (1 / cfg.rho), cfg.sigma_min ** (1 / cfg.rho)
    return (high + u * (low - high)) ** cfg.rho

def edm_sigmas(steps, cfg):
    """The noise levels of the teacher's sampler (steps + 1,): EDM's schedule, then 0, no noise."""
    u = torch.arange(steps) / max(steps - 1, 1)
    return torch.cat([rho_schedule(u, cfg), torch.zeros(1)])

def student_sigmas(steps, cfg):
    """The students' noise levels (steps,): equal steps of u, all below u_end (our reading). For 4
    steps, u = 0, .2, .4, .6: sigma = 80, 24, 5.8, .97. At u_end (.085) a call hardly changes x."""
    return rho_schedule(cfg.u_end * torch.arange(steps) / steps, cfg)

def draw_sigma(distribution, count, cfg, device):
    """Draw noise levels (count,) from a distribution. "discrete": just those of four steps."""
    if distribution == "train":  # ln sigma is Gaussian (EDM, table 1): few extremes
        return (cfg.P_mean + cfg.P_std * torch.randn(count, device=device)).exp()
    if distribution == "low":  # (ours) a fifth of a "train" level: see generator_loss
        return draw_sigma("train", count, cfg, device) / 5
    if distribution == "inf":  # squared (ours): nearly the levels of 1 to 8 steps, mixed
        return rho_schedule(cfg.u_end * torch.rand(count, device=device) ** 2, cfg)
    return student_sigmas(4, cfg).to(device)[torch.randint(4, (count,), device=device)]

def add_noise(x, sigma):  # (batch, channels, frames), () or (batch,)
    return x + sigma.reshape(-1, 1, 1) * torch.randn_like(x)

def dsm_loss(denoised, target, sigma, cfg):
    """Denoising score matching: lambda(sigma) ||denoised - target||^2 (EDM, equations 2 and 8).
    lambda = 1 / c_out^2 makes it F's plain squared error. Else low levels would hardly count."""
    weight = (sigma**2 + cfg.sigma_data**2) / (sigma * cfg.sigma_data) ** 2  # (batch,)
    return (weight.reshape(-1, 1, 1) * (denoised - target).square()).mean()

def guided(denoise, cfg):
    """Classifier-free guidance of a denoiser mu: a denoiser again. w = 1: just mu, half the cost.
        mu(x, label) + (w - 1) * difference,    difference = mu(x, label) - mu(x, null)
    It points to the wanted class. The part of it that is parallel to mu(x, label) only changes
    its loudness, and is multiplied by `parallel`. 1 gives the paper's mu(x, null) + w * difference.
    Less is ours, from APG (adaptive projected guidance, Sadat et al. 2025, arXiv 2410.02416)."""
    if cfg.w == 1:
        return denoise
    def denoise_guided(x, sigma, label):
        sigma = sigma if sigma.ndim == 0 else sigma.repeat(2)
        null = torch.full_like(label, cfg.null)
        both = denoise(x.repeat(2, 1, 1), sigma, torch.cat([label, null]))  # faster than two
        conditional, unconditional = both.chunk(2)  # (batch, channels, frames) each
        difference = conditional - unconditional
        norm2 = conditional.square().sum((1, 2), keepdim=True).clamp_min(1e-9)  # (batch, 1, 1)
        along = (difference * conditional).sum((1, 2), keepdim=True) / norm2 * conditional
        difference = difference - (1 - cfg.parallel) * along
        return conditional + (cfg.w - 1) * difference
    return denoise_guided

@torch.no_grad()
def sample_heun(denoise, x, sigmas, label):
    """Heun's second-order sampler (EDM, algorithm 1) of teacher and Presto-L: 2 * steps - 1 calls.
    dx / dsigma = d, the mean noise. Each step removes some of the noise. The less is left, the
    fewer x0 are possible: their mean sharpens to one clip. x: sigmas[0] * noise."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d = (x - denoise(x, sigma, label)) / sigma  # the mean noise in x
        x_next = x + (sigma_next - sigma) * d  # Euler's step
        if sigma_next > 0:  # else the next line would divide by 0: Euler's step is kept
            d_next = (x_next - denoise(x_next, sigma_next, label)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2  # the path bends: mean of both
        x = x_next
    return x

# ---- Part 4. Teacher: the training loop, and the loss of a denoiser ------------------------------
# All training loops are alike. They use a `run` (Part 8), which offers
#     run.cfg, run.device                settings and device
#     run.latents.sample_batch(count)    real latents x_real, and their labels
#     run.load(stage)                    a new copy of an earlier stage's finished model, frozen
#     run.loop(stage, total, **state)    yields 0 ... total - 1; saves `state` and resumes
#     run.log(model=None, **values)      shows losses, and now and then the model's accuracy
def lr_at(i, total, lr):
    """The learning rate of update i: a short rise, then flat, then a linear fall over the last
    60 %. As it falls, weights jump less from batch to batch: cleaner samples."""
    return lr * min(1, (i + 1) / (0.025 * total), (total - i) / (0.6 * total))

def optimizer_step(loss, optimizer, lr):
    """One update of the optimizer's own parameters, with clipping. `inputs=` computes no gradients
    for others, such as fake score and head, through which the generator's GAN term runs."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not math.isfinite(norm):  # stop before the weights are spoilt
        raise FloatingPointError(f"the loss is {loss.item()}, its gradient's norm {norm.item()}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()

def train_vae(run):
    cfg = run.cfg
    vae = VAE(cfg).to(run.device)
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99), fused=True)
    for i in run.loop("vae", cfg.vae_updates, vae=vae, optimizer=optimizer):
        wave, _ = cfg.world.make_batch(cfg.vae_batch)
        loss, error = vae_loss(vae, wave.to(run.device), cfg)
        optimizer_step(loss, optimizer, lr_at(i, cfg.vae_updates, cfg.vae_lr))
        run.log(loss=loss, SNR=-10 * error.log10())  # signal-to-noise ratio in dB
    with torch.no_grad():  # measure the latents, now that they are final
        waves = [cfg.world.make_batch(64)[0].to(run.device) for _ in range(16)]
        mean = torch.cat([vae.posterior(wave)[0] for wave in waves])  # (1024, channels, frames)
        vae.mean.copy_(mean.mean((0, 2))[:, None])
        vae.scale.copy_(mean.std((0, 2))[:, None] / cfg.sigma_data)
    return vae

class Latents:
    """The training set: `cfg.clips` real clips, encoded once, because the VAE learns no more."""
    def __init__(self, vae, cfg, seed):
        rng = torch.Generator().manual_seed(seed)
        x, label = [], []
        with torch.no_grad():
            for start in range(0, cfg.clips, 64):
                wave, labels = cfg.world.make_batch(min(64, cfg.clips - start), rng)
                x.append(vae.encode(wave.to(vae.mean.device)))
                label.append(labels.to(vae.mean.device))
        self.x, self.label = torch.cat(x), torch.cat(label)  # (clips, channels, frames), (clips,)

    def sample_batch(self, count):
        index = torch.randint(len(self.label), (count,)).to(self.label.device)
        return self.x[index], self.label[index]  # (count, channels, frames), (count,)

def teacher_loss(model, x_real, label, sigma, cfg):
    """The loss of a denoiser: find x_real in x_real + sigma * noise."""
    denoised = model(add_noise(x_real, sigma), sigma, label)  # (batch, channels, frames)
    return dsm_loss(denoised, x_real, sigma, cfg)

def train_denoiser(run, stage, model, loss_of, updates, lr):
    """Train the teacher or Presto-L. They differ in start, loss, and decay of the average."""
    cfg = run.cfg
    # The exponential moving average of the weights is less noisy. It is what is saved and sampled.
    # It must forget its start: decay ** updates is the share of the first weights that remains.
    decay = cfg.ema if stage == "teacher" else cfg.student_ema
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    for i in run.loop(stage, updates, model=model, ema=ema, optimizer=optimizer):
        x_real, label = run.latents.sample_batch(cfg.batch)
        # Ours, so that guidance has an error to mend: some captions name a wrong timbre, as on the
        # web. mu(x, label) then holds some of other timbres; mu(x, null), a mean of all, more:
        # guidance points away from them. (Not in Part 6: a wrong one pulls x_gen off its timbre.)
        if hasattr(cfg.world, "misname"):  # a data module may lack it
            is_wrong = torch.rand(len(label), device=run.device) < cfg.wrong_captions
            label = torch.where(is_wrong, cfg.world.misname(label), label)
        is_dropped = torch.rand(len(label), device=run.device) < cfg.label_dropout
        label = torch.where(is_dropped, cfg.null, label)  # else mu(x, null) is never learnt
        sigma = draw_sigma("train", len(label), cfg, run.device)
        loss = loss_of(model, x_real, label, sigma, cfg)
        optimizer_step(loss, optimizer, lr_at(i, updates, lr))
        ema.update_parameters(model)
        run.log(ema.module, loss=loss)
    return ema.module

def train_teacher(run):
    cfg, model = run.cfg, Denoiser(run.cfg).to(run.device)
    return train_denoiser(run, "teacher", model, teacher_loss, cfg.teacher_updates, cfg.teacher_lr)

# ---- Part 5. Presto-L: fewer layers where there is more noise ------------------------------------
# ASE (Moon et al. 2024): at high noise, a denoiser only has to say roughly what a clip is, and few
# blocks can do that. At low noise, details need all. A trained DiT is fine-tuned to exit early.
# ASE's weakness, as Presto! sees it: the variance of a DiT's hidden state grows sharply in the last
# blocks. The output layer learnt to read what these write, and ASE drops them. Presto-L's changes:
#   1. Shifted dropping: the last block always runs. Blocks before it are dropped (DiT.is_active).
#   2. The network is told its budget (DiT.budget_table). The budget jumps at the edges of bins,
#      where sigma hardly changes. (On these tones, the network does as well without being told.)
#   3. L_st: the frozen teacher, at full depth, teaches the short network (our reading: layer_loss).
def budget_at(sigma, fractions, cfg):
    """How many blocks run at a noise level: an int for sigma (), a tensor (batch,) for (batch,).
    The schedule's u is cut into equal bins (ASE cuts time; u is our reading), so bins have similar
    numbers of teacher steps. `fractions`: bins' shares of the depth, from clean to noisy."""
    bins = len(fractions)
    # Students' u = .2, .4, .6 (4 steps) are edges: edges * 0.999 leave them to the noisier bin.
    edges = 0.999 * rho_schedule(1 - torch.arange(1, bins) / bins, cfg)  # (bins - 1,)
    table = (torch.tensor(fractions) * cfg.depth).round().long().clamp(1, cfg.depth)  # (bins,)
    budget = table.to(sigma.device)[torch.bucketize(sigma, edges.to(sigma.device))]
    return int(budget) if sigma.ndim == 0 else budget

def with_budget(model, stage, cfg):
    """A denoiser that runs as many blocks as `stage` does at a noise level. Most stages run all."""
    fractions = {"presto-l": cfg.fractions, "presto-ls": cfg.fractions_ls}.get(stage)
    if fractions is None:
        return model
    def denoise(x, sigma, label, **options):
        return model(x, sigma, label, budget_at(sigma, fractions, cfg), **options)
    return denoise

def layer_loss(teacher, model, x_real, label, sigma, cfg):
    """The loss of Presto-L: L_DSM (ASE's only loss) + L_st. L_st's target is the network's answer
    at full depth, by its weights from before this training (our reading): nearly E[x0 | x]. x_real,
    one x0 of many, is a noisier target, but it is free of the teacher's errors. Weights in training
    would be a bad teacher: their blocks learn to do more, and at full depth, they do too much."""
    x = add_noise(x_real, sigma)  # (batch, channels, frames)
    short = model(x, sigma, label, budget_at(sigma, cfg.fractions, cfg))
    loss = dsm_loss(short, x_real, sigma, cfg)
    if cfg.self_teacher > 0:
        with torch.no_grad():
            full = teacher(x, sigma, label)  # (batch, channels, frames)
        loss = loss + cfg.self_teacher * dsm_loss(short, full, sigma, cfg)
    return loss

def train_presto_l(run):
    cfg, model = run.cfg, run.load("teacher").requires_grad_(True)
    loss_of = functools.partial(layer_loss, run.load("teacher"))
    return train_denoiser(run, "presto-l", model, loss_of, cfg.layer_updates, cfg.layer_lr)

# ---- Part 6. Presto-S and Presto-LS: fewer steps -------------------------------------------------
# A teacher's answer to pure noise is a mean, a blur: so it must be called often. Presto-S turns it
# into a generator, whose one answer is a sample: L_DMD pulls the distribution of answers to that of
# the guided teacher. Students get right labels, never null ones: they are not guided.
class Discriminator(nn.Module):
    """D_psi's head: four Conv1d blocks with GroupNorm and SiLU, then one channel (paper). It gives
    two answers for a clip, one per half second (paper: 2.8 a second): errors are local."""
    def __init__(self, cfg):
        super().__init__()
        w, layers = cfg.width, []
        for kernel, stride in ((3, 1), (4, 2), (4, 2), (4, 2)):
            layers += [nn.Conv1d(w, w, kernel, stride, padding=1), nn.GroupNorm(4, w), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv1d(w, 1, 1))

    def forward(self, features):  # (batch, frames, width)
        return self.layers(features.mT)[:, 0]  # (batch, frames / 8)

def dmd_gradient(x_gen, sigma, label, real_score, fake_score):
    """The distribution-matching gradient on x_gen, as the code of DMD2 computes it.
        g = (mu_fake(x) - mu_real(x)) / mean|x_gen - mu_real(x)|,   x = x_gen + sigma * noise
    A denoiser mu knows the score, the direction in which noised latents become more frequent:
        grad log p(x) = (mu(x) - x) / sigma^2       (Tweedie's formula; if mu is guided, nearly)
    Both mu get the same x, so -x cancels (p_real: what the guided teacher makes):
        mu_fake - mu_real = sigma^2 * grad log(p_generated / p_real)
    Descent moves x_gen to where p_generated / p_real is lower: to what the teacher makes more often
    than the generator. (The mean of its log is the KL divergence.) Both mu are blurs, but if the
    distributions are equal, the blurs are equal: g is 0, and x_gen stays sharp. (A regression on
    mu_real would blur it.) mu_fake - mu_real grows with sigma: without the divisor, high sigma
    would count most. Only real_score is guided: it says where to go; fake_score, where x_gen is."""
    x = add_noise(x_gen, sigma)  # 3  (batch, channels, frames)
    real = real_score(x, sigma, label)  # 4  (batch, channels, frames)
    fake = fake_score(x, sigma, label)  # 4  (and sigma_gen: see train_student)
    size = (x_gen - real).abs().mean((1, 2), keepdim=True).clamp_min(1e-6)  # (batch, 1, 1)
    return (fake - real) / size

def dmd_loss(x_gen, gradient):
    """Its gradient is g / number of values. A low loss proves little: both mu may err alike."""
    return 0.5 * F.mse_loss(x_gen, (x_gen - gradient).detach())

def anchor_loss(x_gen, x_real, sigma, cfg):
    """Ours: c_skip^2 (x_gen - x_real)^2. x_real and sigma are those of step 1. All levels share
    weights: training at high levels changes the answers at low ones, too, by a few percent. DMD
    does not see it, because the scores' own errors are larger; but over a sampler's steps it adds
    up. At low noise x_real is the only right answer, and x_gen is held to it. At high noise
    many are right: held to a random one, x_gen would blur; but there c_skip^2 is near 0."""
    c_skip = cfg.sigma_data**2 / (sigma**2 + cfg.sigma_data**2)  # (batch,)
    return (c_skip.square().reshape(-1, 1, 1) * (x_gen - x_real).square()).mean()

def generator_loss(x_gen, label, real_score, fake_score, head, cfg):
    """L_DMD + nu1 * L_GAN, for the generator. L_GAN is least squares (paper): the head should say
    1, "real". The head learnt from x_real, so L_GAN can mend errors of the teacher; L_DMD cannot.
    The head reads features of fake_score (DMD2), because fake_score knows x_gen. Features of the
    teacher, learnt from real latents alone, miss errors of x_gen. The head judges at low noise
    (p_gan = "low", ours): more noise would hide here what is wrong. nu1 and nu2 are by trial."""
    sigma = draw_sigma(cfg.p_dmd, len(x_gen), cfg, x_gen.device)  # 3
    with torch.no_grad():  # g is a direction for x_gen: nothing flows back through the scores
        gradient = dmd_gradient(x_gen, sigma, label, real_score, fake_score)  # 4
    sigma = draw_sigma(cfg.p_gan, len(x_gen), cfg, x_gen.device)  # 7
    features = fake_score(add_noise(x_gen, sigma), sigma, label, return_features=True)
    loss_gan = (head(features) - 1).square().mean()  # 8
    return dmd_loss(x_gen, gradient) + cfg.nu1 * loss_gan

def fake_score_loss(x_gen, x_real, label, fake_score, head, cfg):
    """L_fake-DSM + nu2 * L_GAN, for the fake score and the head. L_fake-DSM has the target x_gen:
    with x_real, fake_score would become a second real score. L_GAN teaches the lower half of
    fake_score, and the head, to answer 1 to x_real and 0 to x_gen. x_gen and x_real get the same
    sigma (and sigma_gen: see fake_at): so the head can judge only by content."""
    sigma = draw_sigma(cfg.p_dsm, len(x_gen), cfg, x_gen.device)  # 5
    denoised = fake_score(add_noise(x_gen, sigma), sigma, label)  # (batch, channels, frames)
    loss_dsm = dsm_loss(denoised, x_gen, sigma, cfg)  # 6
    sigma = draw_sigma(cfg.p_gan, len(x_gen), cfg, x_gen.device)  # 7
    features_gen = fake_score(add_noise(x_gen, sigma), sigma, label, return_features=True)
    features_real = fake_score(add_noise(x_real, sigma), sigma, label, return_features=True)
    loss_gan = head(features_gen).square().mean() + (head(features_real) - 1).square().mean()  # 8
    return loss_dsm + cfg.nu2 * loss_gan

def train_student(run, stage):
    """Train Presto-S, or Presto-LS: the same loop, but the generator drops layers, and starts from
    Presto-L, which can do that. Scores keep full depth (our reading): short ones would teach the
    generator errors, and only the generator must be fast. `tell_level` (ours): fake_score is told
    the level of the generator's input. Else it sees answers to all levels mixed. If these are too
    quiet at some levels, too loud at others, the mixture looks right, and nothing mends them."""
    cfg, is_ls = run.cfg, stage == "presto-ls"
    score_stage = "presto-l" if is_ls and not cfg.full_scores else "teacher"
    generator_net = run.load(cfg.ls_start if is_ls else "teacher").requires_grad_(True)
    fake_net = run.load(score_stage).requires_grad_(True)  # a denoiser already: it catches up soon
    if cfg.tell_level:
        fake_net.net.gen_level = LevelEmbedding(cfg.width).to(run.device)
    head = Discriminator(cfg).to(run.device)
    generator = with_budget(generator_net, stage, cfg)
    real_score = guided(with_budget(run.load(score_stage), score_stage, cfg), cfg)
    fake_score = with_budget(fake_net, score_stage, cfg)
    ema = AveragedModel(generator_net, multi_avg_fn=get_ema_multi_avg_fn(cfg.student_ema))
    # No momentum for the generator (ours): old gradients came from an older fake_score.
    optimizer = torch.optim.Adam(generator_net.parameters(), betas=(0.0, 0.999), fused=True)
    fake_optimizer = torch.optim.Adam([*fake_net.parameters(), *head.parameters()], fused=True)
    def make_x_gen():
        x_real, label = run.latents.sample_batch(cfg.student_batch)
        sigma = draw_sigma(cfg.p_gen, len(label), cfg, run.device)  # 1
        return generator(add_noise(x_real, sigma), sigma, label), x_real, label, sigma  # 2
    def fake_at(sigma):  # fake_score, told the level of the generator's input, if it has gen_level
        return functools.partial(fake_score, sigma_gen=sigma)
    for i in run.loop(stage, cfg.student_updates, net=generator_net, ema=ema, fake=fake_net,
                      head=head, optimizer=optimizer, fake_optimizer=fake_optimizer):
        # DMD is wrong if fake_score lags: so 5 updates; at first 100 (ours): gen_level is new.
        for _ in range(cfg.warm_updates if i == 0 else cfg.fake_updates):
            with torch.no_grad():
                x_gen, x_real, label, sigma = make_x_gen()  # 1, 2
            loss_fake = fake_score_loss(x_gen, x_real, label, fake_at(sigma), head, cfg)  # 5 to 8
            optimizer_step(loss_fake, fake_optimizer, cfg.fake_lr)
        x_gen, x_real, label, sigma = make_x_gen()  # 1, 2
        loss = generator_loss(x_gen, label, real_score, fake_at(sigma), head, cfg)  # 3, 4, 7, 8
        loss = loss + cfg.anchor * anchor_loss(x_gen, x_real, sigma, cfg)
        optimizer_step(loss, optimizer, lr_at(i, cfg.student_updates, cfg.generator_lr))
        ema.update_parameters(generator_net)
        run.log(ema.module, loss=loss, fake=loss_fake)  # losses need not fall: see recall in eval
    return ema.module

@torch.no_grad()
def sample_multistep(denoise, x, sigmas, label):
    """The students' sampler: denoise to x0, noise x0 to the next sigma, repeat: less noise, finer
    details. x: noise with the deviation sigmas[0], which hides any x0. Not guided: L_DMD taught
    guidance. (sample_heun would need means, not samples.) In training x_real is noised, here x0:
    alike, if x0 is good. (DMD2 trains on noised x0.) Any number works; each adds errors."""
    x0 = denoise(x, sigmas[0], label)
    for sigma in sigmas[1:]:
        x = x0 + sigma * torch.randn(x.shape).to(x.device)  # fresh: x0 depends on the old noise
        x0 = denoise(x, sigma, label)  # (batch, channels, frames)
    return x0

# ---- Part 7. Generating and measuring ------------------------------------------------------------
# Models for sample_multistep. "re-noised" is a baseline: the teacher, unguided, not distilled.
MULTISTEP = ["re-noised", "presto-s", "presto-ls"]
@torch.inference_mode()
def make_clips(name, model, vae, label, steps, cfg):
    """Clips (batch, time) on the CPU for label (batch,), and the seconds that they took. Noise is
    drawn on the CPU, so that one seed means nearly the same sound everywhere."""
    start, device = time.perf_counter(), vae.mean.device
    label, noise = label.to(device), torch.randn(len(label), cfg.latent_channels, cfg.frames)
    denoise = with_budget(model, name, cfg)
    if name in MULTISTEP:
        sigmas = student_sigmas(steps, cfg).to(device)
        latents = sample_multistep(denoise, sigmas[0] * noise.to(device), sigmas, label)
    else:
        sigmas = edm_sigmas(steps, cfg).to(device)
        latents = sample_heun(guided(denoise, cfg), sigmas[0] * noise.to(device), sigmas, label)
    wave = vae.decode(latents).float().cpu()  # on a GPU, this waits until all is computed
    return wave, time.perf_counter() - start

def variance_by_level(denoise, x_real, label, sigma):
    """Variance of answers to noised x_real (batch, channels, frames), divided by that of x_real,
    both within classes. In much noise: near 0 if answers are means, near 1 if samples."""
    def variance(x):
        return sum(x[label == c].var(0).sum() for c in label.unique())
    answers = denoise(add_noise(x_real, sigma), sigma, label)
    return (variance(answers) / variance(x_real)).item()

# ---- Part 8. Runs, and the command line. No lesson here. -----------------------------------------
def seed_with(*parts):
    """Seed torch from any values. Every update and every clip has a seed of its own: so an
    interrupted training ends as an uninterrupted one, and clip 3 is the same for every --count."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))

def write_file(path, data):
    """Write bytes under a temporary name, then rename: nobody ever finds half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder")

class Run:
    """A folder with one checkpoint per stage, and the progress bar of the stage in training."""
    def __init__(self, folder, device, cfg=None, seed=0, save_every=60.0):
        self.folder, self.device, self.cfg = pathlib.Path(folder), device, cfg
        self.seed, self.save_every = seed, save_every
    @functools.cached_property
    def vae(self):
        return self.load("vae")
    @functools.cached_property
    def latents(self):
        return Latents(self.vae, self.cfg, self.seed)
    def path(self, stage):
        return self.folder / f"{stage}.pt"
    def is_done(self, stage):
        return self.path(stage).exists() and self.read(stage)["update"] == "done"
    def facts(self):
        prompts = zlib.crc32(repr(self.cfg.world.PROMPTS).encode())  # tells data sets apart
        return {**dataclasses.asdict(self.cfg), "seed": self.seed, "prompts": prompts}
    def loop(self, stage, total, **state):
        start = self.read(stage, **state)["update"] if self.path(stage).exists() else 0
        self.stage, self.total, self.shown, saved = stage, total, {}, time.monotonic()
        with tqdm(total=total, initial=start, desc=f"{stage:9}", dynamic_ncols=True) as self.bar:
            for self.update in range(start, total):
                if time.monotonic() - saved > self.save_every:
                    self.save(stage, self.update, **state)
                    saved = time.monotonic()
                seed_with(self.seed, stage, self.update)
                yield self.update
                self.bar.update()
        seed_with(self.seed, stage, total)  # for what is drawn after the loop
    def log(self, model=None, **values):
        self.shown.update(values)
        world, done = self.cfg.world, self.update + 1
        is_due = done % max(self.total // 6, 1) == 0 or done == self.total
        if model is not None and is_due and hasattr(world, "is_correct"):
            label = torch.arange(len(world.PROMPTS))
            seed_with(self.seed, "listen")
            steps = 4 if self.stage in MULTISTEP else self.cfg.teacher_steps
            wave, _ = make_clips(self.stage, model, self.vae, label, steps, self.cfg)
            self.shown["accuracy"] = world.is_correct(wave, label).float().mean()
        self.bar.set_postfix({k: f"{v.item():.3f}" for k, v in self.shown.items()}, refresh=False)

    def train(self, stage):
        if stage != "vae":
            _ = self.latents  # before seeding, because it may build a VAE, of random weights
        seed_with(self.seed, stage, "start")
        try:
            self.save(stage, "done", model=TRAIN[stage](self))
        except FloatingPointError as error:
            raise UserError(f"{stage}, update {self.update}: {error}; lower its learning rate, and "
                            f"train again with --stage {stage}")
    def load(self, stage):
        if self.read(stage)["update"] != "done":
            raise UserError(f"{self.path(stage)} is unfinished; go on: train --out {self.folder}")
        model = VAE(self.cfg) if stage == "vae" else Denoiser(self.cfg)
        self.read(stage, model=model)
        return model.to(self.device).eval().requires_grad_(False)
    def save(self, stage, update, **state):
        state = {name: part.state_dict() for name, part in state.items()}
        buffer = io.BytesIO()
        torch.save({"facts": self.facts(), "update": update, "state": state}, buffer)
        write_file(self.path(stage), buffer.getvalue())

    def read(self, stage, **state):
        """Read a checkpoint into the parts of `state`; returns its content. A file is refused if a
        setting of this or an earlier stage differs. No code in it is ever run."""
        path, fields = self.path(stage), dataclasses.fields(Config)
        again = f"python presto.py train --out {self.folder}"
        if not path.exists():
            raise UserError(f"{path} does not exist: train it with `{again}`")
        try:
            with zipfile.ZipFile(path) as archive:  # torch writes zip files, with checksums
                if archive.testzip():
                    raise zipfile.BadZipFile
            saved = torch.load(path, map_location="cpu", weights_only=True)
            theirs = saved["facts"]
            if self.cfg is None:
                self.cfg = Config(**{field.name: theirs[field.name] for field in fields})
                self.seed = theirs["seed"]
            first = {"seed": 0, "prompts": 0} | {f.name: f.metadata["stage"] for f in fields}
            changed = {f"{name} ({theirs[name]} there, {value} here)": first[name]
                       for name, value in self.facts().items()
                       if theirs[name] != value and first[name] <= STAGES.index(stage)}
            if changed:
                raise UserError(f"{path} was trained with other settings: {'; '.join(changed)}. "
                                "Choose another --out, or train again with --stage "
                                f"{STAGES[min(changed.values())]}")
            for name, part in state.items():
                part.load_state_dict(saved["state"][name])
        except (ImportError, UserError):  # the file is sound, its data module or a setting is not
            raise
        except Exception as error:  # zipfile, zlib, pickle and torch name damage differently
            raise UserError(f"{path} is damaged, or of another version of this file: "
                            f"train it again with `{again} --stage {stage}`") from error
        return saved

TRAIN = {"vae": train_vae, "teacher": train_teacher, "presto-l": train_presto_l,
         **{stage: functools.partial(train_student, stage=stage) for stage in STAGES[3:]}}
def pick_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not on this machine; cpu always is")

def command_train(args):
    device = pick_device(args.device)
    preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    chosen = {name: value for name, value in vars(args).items() if hasattr(Config, name)}
    run = Run(args.out, device, Config(**PRESETS[preset] | chosen), args.seed, args.save_every)
    again = STAGES[STAGES.index(args.stage):] if args.stage else []
    for stage in [stage for stage in STAGES if run.path(stage).exists()]:
        if stage in again:  # deleted only after all earlier files were read
            run.path(stage).unlink()
        else:
            run.read(stage)
    start = time.monotonic()
    print(f"Training with the preset {preset} on {device}, seed {args.seed}, into {run.folder}")
    for stage in STAGES[:STAGES.index(args.until) + 1]:
        if run.is_done(stage):
            print(f"{stage:9}: done before")
        else:
            run.train(stage)
    minutes = (time.monotonic() - start) / 60
    print(f"Done in {minutes:.1f} minutes. Next: python presto.py sample --run {run.folder}")

def command_sample(args):
    run = Run(args.run, pick_device(args.device))
    model, vae = run.load(args.model), run.vae
    world, folder = run.cfg.world, pathlib.Path(args.out)
    try:
        labels = toy_data.parse_prompt(args.prompt, world.PROMPTS)
    except ValueError as error:
        raise UserError(str(error))
    steps = args.steps or (4 if args.model in MULTISTEP else run.cfg.teacher_steps)
    summary, correct, groups = f"{args.model}, {steps} steps", [], {}
    for label, index in itertools.product(labels, range(args.count)):
        seed_with(args.seed, label, index)
        prompt, one = world.PROMPTS[label], torch.tensor([label])
        wave, _ = make_clips(args.model, model, vae, one, steps, run.cfg)
        wave = wave / wave.abs().max().clamp_min(1)  # turned down, rather than clipped
        name = f"{prompt.replace(' ', '-')}-{index:03d}.wav"
        write_file(folder / name, toy_data.wav_bytes(wave[0], world.SAMPLE_RATE))
        groups.setdefault(prompt, []).append((name, wave[0]))
        heard = f"heard: {world.describe(wave)[0]}" if hasattr(world, "describe") else ""
        if hasattr(world, "is_correct"):
            correct.append(world.is_correct(wave, one).item())
            heard += "" if correct[-1] else "  WRONG"
        print(f"{name:22}{heard}")
    if correct:
        summary += f": {sum(correct)} of {len(correct)} clips are what was asked for"
    page = toy_data.page("Presto! samples", summary, [], [], groups, world.SAMPLE_RATE)
    write_file(folder / "index.html", page.encode())
    print(f"{summary}\nTo see and hear them: {folder / 'index.html'}")

@torch.inference_mode()
def command_eval(args):
    run = Run(args.run, pick_device(args.device))
    # is_done reads files. The one read first sets run.cfg, so the newest must be first.
    stages = [stage for stage in STAGES[:0:-1] if run.is_done(stage)][::-1]
    vae, cfg, world = run.vae, run.cfg, run.cfg.world
    classes, full = len(world.PROMPTS), cfg.teacher_steps
    label = torch.arange(classes).repeat(max(args.count, 2))  # one clip has no spread
    rng = torch.Generator().manual_seed(args.seed)
    reference = toy_data.Reference(world, world.make_batch(len(label), rng, label)[0], label)
    real, _ = world.make_batch(len(label), rng, label)  # "real" and "VAE": the best to be reached
    x_real = torch.cat([vae.encode(part.to(run.device)) for part in real.split(classes)])
    clips = {"real": real, "VAE": torch.cat([vae.decode(x).cpu() for x in x_real.split(classes)])}
    rows = {title: toy_data.measure(world, wave, label, reference) for title, wave in clips.items()}
    models = {name: run.load(name) for name in stages} | {"re-noised": run.load("teacher")}
    teacher = functools.partial(make_clips, "teacher", models["teacher"], vae, steps=full, cfg=cfg)
    wanted = [("teacher", full, cfg.w), ("teacher", full, 1.0), ("presto-l", full, cfg.w)]
    wanted += [("teacher", steps, cfg.w) for steps in (4, 8, 12, 32) if steps != full]
    wanted += [(name, steps, None) for name in MULTISTEP for steps in (1, 2, 4, 8, 16)]
    for name, steps, w in tqdm([row for row in wanted if row[0] in models], desc="eval"):
        title = f"{name}, {steps} steps" + ("" if w is None else f", w = {w:g}")
        make = functools.partial(make_clips, name, models[name], vae, steps=steps,
                                 cfg=cfg if w is None else dataclasses.replace(cfg, w=w))
        seed_with(args.seed, "noise")  # the same seed for every row
        clips[title] = torch.cat([make(label=part)[0] for part in label.split(classes)])
        rows[title] = toy_data.measure(world, clips[title], label, reference)
        for column, part, turns in (("alone", label[:1], 12), ("batch", label[:classes], 3)):
            pairs = [(teacher(label=part)[1], make(label=part)[1]) for _ in range(turns)]
            first, own = map(min, zip(*pairs))  # in turn, as speed drifts; min: other programs run
            rows[title][column] = first / own
    curves = {}
    for stage, sigma in itertools.product(stages, rho_schedule(torch.linspace(0, 0.7, 8), cfg)):
        denoise = with_budget(models[stage], stage, cfg)
        ratio = variance_by_level(denoise, x_real, label.to(run.device), sigma.to(run.device))
        curves.setdefault(stage, []).append((sigma.item(), ratio))
    note = (f"{len(label)} clips a row, evaluation seed {args.seed}. alone, batch: how much faster "
            f"than the teacher's {full} steps, one clip at a time and {classes} at once.")
    text, page = toy_data.report(world, f"Presto! {run.folder}", note, rows, curves, clips)
    write_file(run.folder / "eval.json", json.dumps({"rows": rows, "variance": curves}).encode())
    write_file(run.folder / "report.html", page.encode())
    print(f"{text}\nTo see and hear it: {run.folder / 'report.html'}")

def positive(text):  # argparse's type for a whole number from 1
    if int(text) < 1:
        raise ValueError
    return int(text)
def shares(text):  # argparse's type for a list, such as [1, 0.5]; an empty one is a ValueError
    first, *others = map(float, json.loads(text))
    return first, *others

def make_parser():
    parser = argparse.ArgumentParser("presto.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, prog="presto.py")
    def command(name, function, folder, help):
        sub = commands.add_parser(name, usage="%(prog)s [options]", help=help, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument(folder, default="runs/presto", help="the run's folder (%(default)s)")
        sub.add_argument("--seed", type=int, default=0, help="same seed, same sounds (0)")
        sub.add_argument("--device", help="cuda, mps or cpu (cuda if there is one)")
        return sub.add_argument
    option = command("train", command_train, "--out", "train, or go on after an interruption")
    option("--preset", choices=PRESETS, help="set of settings (default: gpu on CUDA, else cpu)")
    option("--stage", choices=STAGES, help="train again from this stage on")
    option("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    option("--save_every", type=float, default=60, help="seconds between saves (60)")
    for field in dataclasses.fields(Config):  # every setting is an option
        kind = {bool: json.loads, tuple: shares}.get(field.type, field.type)
        help = f"{field.metadata['help']} ({str(field.default).strip('()')})"
        option(f"--{field.name}", type=kind, metavar=field.type.__name__, help=help,
               choices=field.metadata["choices"], default=argparse.SUPPRESS)
    option = command("sample", command_sample, "--run", "write clips, and say what is heard")
    option("--steps", type=positive, help="sampling steps (students: 4)")
    option("--model", default="presto-ls", choices=STAGES[1:], help="(%(default)s)")
    option("--prompt", default="all", help="the name of a class, or all (all)")
    option("--count", type=positive, default=1, help="clips per prompt (1)")
    option("--out", default="samples", help="folder for the WAVs (%(default)s)")
    option = command("eval", command_eval, "--run", "measure every model: a table and a page")
    option("--count", type=positive, default=16, help="clips per class (16; at least 2)")
    return parser

def main(arguments=None):
    try:
        args = make_parser().parse_args(arguments)
        args.function(args)
        return 0
    except (UserError, ImportError) as error:
        print(f"presto.py: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or `| head`
        print("\nInterrupted. `train` without --stage goes on from its last save.", file=sys.stderr)
        return 130
if __name__ == "__main__":
    sys.exit(main())
