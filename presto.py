"""Presto! in one file: distilling a diffusion model's steps and layers, on tones you can check.

    python presto.py train                  VAE -> teacher -> Presto-L -> Presto-S -> Presto-LS
    python presto.py sample --steps 4       hear what Presto-LS learnt

An unofficial, minimal and educational implementation of "Presto! Distilling Steps and Layers for
Accelerating Music Generation" (Novack et al., ICLR 2025, arXiv 2410.05167), whose authors released no
code. Where the public record of the paper is silent, a comment says "our reading".

READING ORDER (it is the order of execution too)
    Part 0  Config      the numbers, and their reasons
    Part 1  VAE         waveform <-> latents                           Kingma & Welling 2014
    Part 2  DiT         the network: adaLN-Zero, and blocks to skip    Peebles & Xie 2023
    Part 3  EDM         noise, preconditioning, Heun's sampler, CFG    Karras et al. 2022
    Part 4  Teacher     denoising score matching
    Part 5  Presto-L    fewer layers: ASE, and what Presto changes     Moon et al. 2024
    Part 6  Presto-S    fewer steps: DMD2 + GAN for continuous sigma   Yin et al. 2024
            Presto-LS   both: the same loop, started from Presto-L
    Part 7  Generating  the same few lines for every model
    Part 8  Runs        saving, resuming, checking: no lesson here, skip it at first
    Part 9  The command line

SYMBOLS (the paper's name, then the name in this file)
    x_real          x_real          a latent from the VAE; its standard deviation is sigma_data
    e, null         label, null     the condition: text in the paper, one of 48 classes here
    sigma, epsilon  sigma, noise    noise level and unit Gaussian: x + sigma * noise is the noisy input
    mu_theta        real_score      the frozen teacher, a denoiser
    mu_psi          fake_score      a denoiser that follows what the generator makes
    G_phi           generator       the few-step student, a denoiser too
    D_psi           head            the discriminator's head, on fake_score's half-way activations
    p(sigma^train)  "train"         EDM's log-normal training distribution of sigma
    p(sigma^inf)    "inf"           what EDM's rho-schedule visits at inference, made continuous
    p_gen, p_DMD,   p_gen, p_dmd,   which of these two is drawn from, at the four places where noise is used;
    p_DSM, p_GAN    p_dsm, p_gan    DMD: distribution matching distillation, DSM: denoising score matching

THE PRESTO-S LOOP (the paper's Figure 1; the numbers come back as comments in Part 6)

    x_real --(1) + p_gen noise--> [ generator ] --(2)--> x_gen ------+-------------------------.
                                       ^                             |                         |
                                       |                    (3) + p_DMD noise         (5) + p_DSM noise
                                       |                      |            |                   |
                                       |                [real_score]  [fake_score]       [fake_score]
                                       |                      |   (4)      |                   |
                                       |<--- 1 update of 6 -- fake  -   real           (6) learns to denoise
                                       |                                               x_gen: 5 updates of 6
                                       |                                                       |
                                       '<-- (8) "look real" -- [head on fake_score] -- (8) tell apart
                                                                       ^
                                                     (7) x_gen and x_real + p_GAN noise
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import zipfile
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import toy_data
from toy_data import CLIP_SECONDS, NULL_LABEL, NUM_CLASSES

# ================================================================================================
# Part 0. Config: the numbers of the method, and their reasons
# ================================================================================================
STAGES = ["vae", "teacher", "presto-l", "presto-s", "presto-ls"]   # in the order in which they are trained


def knob(stage, default, why, low=None, high=1e7, choices=None):
    """A Config field: its value, the first stage to train again when it changes, its reason (shown by `train -h`), and
    what the command line accepts: at least 1 for a whole number and 0 for another, unless `low` says otherwise."""
    low = low if low is not None else 1 if type(default) is int else 0.0
    return dataclasses.field(default=default, metadata=dict(stage=stage, why=why, low=low, high=high, choices=choices))


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. The defaults are the `cpu` preset; PRESETS holds what the others change."""
    # VAE
    stride: int = knob("vae", 512, "samples in a latent frame: 16 frames a clip. Twice as many learn slower (10 % of classes "
                                   "right after 90 s, not 59 %) and end alike (README, row 11)")
    latent_channels: int = knob("vae", 16, "in an early trial 16 gave 20.9 dB and 99.5 % of classes right, 8 gave 19.5 dB and 95 %")
    vae_width: int = knob("vae", 256, "channels at frame rate")
    encoder_blocks: int = knob("vae", 3, "residual blocks in the encoder")
    decoder_blocks: int = knob("vae", 5, "residual blocks in the decoder, which has the harder task")
    kl_weight: float = knob("vae", 1e-2, "at 1e-3 the decoder learnt to need latents more exact than a DiT can make them")
    stft_weight: float = knob("vae", 0.2, "weight of the multi-resolution STFT term beside the waveform term")
    vae_steps: int = knob("vae", 2500, "training steps")
    vae_batch: int = knob("vae", 16, "clips a step; at equal time, many small batches beat fewer large ones")
    vae_lr: float = knob("vae", 1e-3, "AdamW's learning rate, falling to zero")
    # DiT and EDM
    width: int = knob("teacher", 128, "channels of a token")
    depth: int = knob("teacher", 8, "blocks; the paper has 28. With 4, Presto-S still comes near its teacher, Presto-LS less (README, row 11)", low=2)
    heads: int = knob("teacher", 4, "attention heads")
    sigma_data: float = knob("vae", 0.5, "standard deviation of the latents (EDM)", low=1e-3)
    sigma_min: float = knob("presto-l", 0.002, "lowest noise level (EDM)", low=1e-6)
    sigma_max: float = knob("presto-l", 20.0, "highest noise level; EDM's 80 is for images: see train_steps")
    rho: float = knob("presto-l", 7.0, "bends the sigma schedule towards low noise (EDM)", low=1.0)
    P_mean: float = knob("teacher", 0.4, "mean of ln sigma in training; EDM's -1.2, for images, is too low: all of a "
                                         "tone's dimensions vary together, so it can still be told at sigma = 10", low=-20.0)
    P_std: float = knob("teacher", 1.6, "standard deviation of ln sigma in training (EDM: 1.2)")
    # Teacher
    bank: int = knob("teacher", 16384, "clips encoded once, from which all later stages draw their x_real")
    teacher_steps: int = knob("teacher", 4500, "training steps")
    batch: int = knob("teacher", 32, "clips a step, for the teacher and Presto-L")
    teacher_lr: float = knob("teacher", 1e-3, "Adam's learning rate, falling to zero")
    teacher_ema: float = knob("teacher", 0.998, "decay of the averaged weights, which are what is sampled, also of Presto-L", high=0.99999)
    label_dropout: float = knob("teacher", 0.1, "share of null labels, so that CFG has its two halves", high=0.99)
    cfg_scale: float = knob("presto-l", 1.25, "w of classifier-free guidance when the teacher is sampled")
    teacher_sampling_steps: int = knob("presto-l", 16, "Heun steps at which the teacher stops improving")
    # Presto-L (Part 5)
    budgets: tuple = knob("presto-l", (1.0, 1.0, .86, .86, .71, .71, .57, .57, .43, .43),
                          "share of the blocks that run, over ten bins of noise from clean to noisy (ASE)", low=0.01, high=1.0)
    shift: bool = knob("presto-l", True, "the last block always runs, and what is dropped lies before it (Presto-L's change 1 to ASE)")
    budget_embedding: bool = knob("presto-l", True, "tell the network how many blocks will run (change 2)")
    self_teacher: float = knob("presto-l", 1.0, "weight of L_st, full depth teaching the short pass (change 3)")
    layer_steps: int = knob("presto-l", 800, "training steps")
    layer_lr: float = knob("presto-l", 3e-4, "Adam's learning rate, falling to zero (ASE: 1e-5, at its scale)")
    # Presto-S and Presto-LS (Part 6)
    p_gen: str = knob("presto-s", "inf", "noise on the generator's input: inf, train, or four (fixed levels, as in DMD2)",
                      choices=["inf", "train", "four"])
    p_dmd: str = knob("presto-s", "train", "noise under which the two scores are compared: train or inf", choices=["train", "inf"])
    p_dsm: str = knob("presto-s", "train", "noise under which the fake score learns: train or inf", choices=["train", "inf"])
    p_gan: str = knob("presto-s", "train", "noise under which the discriminator listens: train or inf", choices=["train", "inf"])
    nu1: float = knob("presto-s", 0.01, "weight of the GAN term in the generator's loss (paper)")
    nu2: float = knob("presto-s", 0.005, "weight of the GAN term in the fake score's loss (paper)")
    dmd_cfg_scale: float = knob("presto-s", 1.0, "w of guidance in DMD's real score; in this toy any w > 1 makes every call louder")
    fake_updates: int = knob("presto-s", 5, "fake-score updates per generator update (paper: 4 to 6 alike)")
    student_steps: int = knob("presto-s", 120, "generator updates")
    student_batch: int = knob("presto-s", 32, "clips a step")
    generator_lr: float = knob("presto-s", 1e-4, "Adam's learning rate, constant (paper: 5e-7 at its scale)")
    fake_lr: float = knob("presto-s", 2e-4, "Adam's learning rate of fake score and head, constant")
    student_ema: float = knob("presto-s", 0.98, "decay of the generator's averaged weights", high=0.99999)
    budgets_ls: tuple = knob("presto-ls", (1.0, 1.0, 1.0, 1.0, 1.0, .86, .86, .57, .43, .43),
                             "as budgets, but milder: each of Presto-LS's few calls must do more (our reading)", low=0.01, high=1.0)
    ls_start: str = knob("presto-ls", "presto-l", "what Presto-LS's generator starts from: layers first, then steps (our reading)",
                         choices=["presto-l", "presto-s"])
    full_scores: bool = knob("presto-ls", True, "Presto-LS's two scores keep full depth (our reading)")

    @property
    def frames(self):                                                # latent frames a clip
        return toy_data.CLIP_SAMPLES // self.stride


PRESETS = {
    "cpu": {},
    "gpu": dict(vae_width=384, vae_steps=20000, vae_batch=64, width=384, depth=12, heads=6, bank=65536,
                teacher_steps=20000, batch=256, teacher_lr=5e-4, teacher_ema=0.9995, layer_steps=4000,
                student_steps=2000, student_batch=128, generator_lr=5e-5, fake_lr=1e-4, student_ema=0.995),
    "tiny": dict(latent_channels=4, vae_width=16, encoder_blocks=1, decoder_blocks=1, vae_steps=4,
                 vae_batch=4, width=16, depth=4, heads=2, bank=64, teacher_steps=4, batch=8, layer_steps=3,
                 student_steps=2, student_batch=4, teacher_sampling_steps=4),
}

# ================================================================================================
# Part 1. VAE: waveform <-> latents
# ================================================================================================
# The paper's VAE turns 44.1 kHz music into latents; this one turns 8 kHz tones into 16 frames. The
# first convolution cuts the waveform into overlapping frames and all other work happens at frame rate:
# convolutions at sample rate took six times as long a step.


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(norm(x)))), with the last convolution starting at zero.

    The norm is over channels only. A norm over time would erase the loudness that an envelope is made
    of; none at all learnt slower (an SNR of 12.0 against 13.0 dB after 100 seconds).
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):                                            # (batch, width, frames)
        h = self.norm(x.mT).mT
        return x + self.conv2(F.silu(self.conv1(h)))


class VAE(nn.Module):
    """A 1-D convolutional VAE. `encode` and `decode` are what the rest of the file uses."""

    def __init__(self, cfg):
        super().__init__()
        w, s = cfg.vae_width, cfg.stride
        self.encoder = nn.Sequential(
            nn.Conv1d(1, w, 2 * s, s, padding=s // 2),
            *[ResidualBlock(w) for _ in range(cfg.encoder_blocks)],
            nn.Conv1d(w, 2 * cfg.latent_channels, 1))
        self.decoder = nn.Sequential(
            nn.Conv1d(cfg.latent_channels, w, 1),
            *[ResidualBlock(w) for _ in range(cfg.decoder_blocks)],
            nn.ConvTranspose1d(w, 1, 2 * s, s, padding=s // 2))
        # Diffusion wants latents of a known scale: every channel is normalised to sigma_data.
        self.register_buffer("mean", torch.zeros(cfg.latent_channels, 1))
        self.register_buffer("scale", torch.ones(cfg.latent_channels, 1))

    def posterior(self, wave):
        """Waveform (batch, time) -> mean and log standard deviation, each (batch, channels, frames)."""
        mean, log_std = self.encoder(wave[:, None]).chunk(2, dim=1)
        return mean, log_std.clamp(-10, 3)

    def encode(self, wave):
        """Waveform (batch, time) -> latents (batch, channels, frames) with standard deviation sigma_data."""
        return (self.posterior(wave)[0] - self.mean) / self.scale

    def decode(self, latents):
        """Latents (batch, channels, frames) -> waveform (batch, time)."""
        return self.decoder(latents * self.scale + self.mean)[:, 0]


def stft_distance(output, wave):
    """Relative squared distance of magnitude spectra at two resolutions; (batch, time) twice -> scalar.

    Magnitudes forgive a phase that is a little off, where the waveform term does not. The usual L1
    distance of log magnitudes pulls hardest where there is almost nothing: with it, 90 seconds of training
    gave 16.4 dB and 69 % of the classes right, without it 20.3 dB and 99 %.
    """
    total = 0.0
    for n in (1024, 256):
        window = torch.hann_window(n, device=wave.device)
        A, B = (torch.stft(x, n, n // 2, window=window, return_complex=True).abs() for x in (output, wave))
        total = total + ((A - B).square().sum((1, 2)) / B.square().sum((1, 2))).mean() / 2
    return total


def vae_loss(vae, wave, cfg):
    """Relative waveform error + STFT distance + KL to the unit Gaussian. Returns (loss, error).

    The error is relative to each clip's energy, so that a quiet clip counts as a loud one does:
    -10 log10(error) is the SNR in dB. Without this waveform term the phase is never learnt.
    """
    mean, log_std = vae.posterior(wave)
    latents = mean + log_std.exp() * torch.randn_like(mean)
    output = vae.decoder(latents)[:, 0]
    error = ((output - wave).square().sum(1) / wave.square().sum(1)).mean()
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).mean()
    return error + cfg.stft_weight * stft_distance(output, wave) + cfg.kl_weight * kl, error


def share_right(wave, label):
    """Share of clips whose pitch and timbre are what was asked for, by toy_data's listening."""
    return toy_data.is_right(toy_data.listen(wave), label)[0].float().mean().item()


def train_vae(run, stage):
    """Train the VAE, then measure its latents' scale."""
    cfg = run.cfg
    vae = run.place(VAE(cfg))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    for step in run.steps(stage, cfg.vae_steps, vae=vae, optimizer=optimizer):
        wave, _ = toy_data.make_batch(cfg.vae_batch)
        loss, error = vae_loss(vae, wave.to(run.device), cfg)
        update(loss, optimizer, anneal(cfg.vae_lr, step, cfg.vae_steps))
        run.show(loss=loss, error=error)
        if run.listens(step, cfg.vae_steps):
            wave, label = toy_data.make_batch(4 * NUM_CLASSES)
            with torch.no_grad():
                output = vae.decode(vae.encode(wave.to(run.device)))
            run.show(right=share_right(output, label))
    with torch.no_grad():                                            # the latents' scale, over 1024 clips
        mean = torch.cat([vae.posterior(toy_data.make_batch(64)[0].to(run.device))[0] for _ in range(16)])
        vae.mean.copy_(mean.mean((0, 2))[:, None])
        vae.scale.copy_(mean.std((0, 2))[:, None] / cfg.sigma_data)
    return vae


# ================================================================================================
# Part 2. DiT: the network, and blocks to skip
# ================================================================================================


class Block(nn.Module):
    """adaLN-Zero transformer block (DiT, section 3.2).

    The conditioning vector sets a shift, a scale and a gate for each of the two branches. They start at
    zero, so that at the start every block is the identity, and dropping it would change nothing.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.adaln = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, h, c):                                         # (batch, frames, width), (batch, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(h) * (1 + scale1) + shift1)        # (batch, frames, 3 * width)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (batch, heads, frames, head width)
        a = F.scaled_dot_product_attention(q, k, v)
        h = h + gate1 * self.out(a.transpose(1, 2).flatten(2))
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """F_theta of EDM's equation 7: (scaled noisy latents, c_noise, label, budget) -> latents' shape.

    `budget` is how many of the `depth` blocks run: None (all), an int for the whole batch (the others are
    really skipped: sampling), or one value a sample (every block is computed and each sample keeps what
    its own budget allows: training, where a batch mixes noise levels).

    Which blocks run is Presto-L's first change. ASE's early exit takes the first `budget` blocks and
    goes straight to the output layer. `shift` drops before the last block instead: budget - 1 blocks from
    the front, then the last one, which always runs (our reading).

    `half` stops half-way and returns the hidden state (batch, frames, width), which the discriminator reads
    (the paper: after block 14 of 28). The upper half is not run: the head does not need it.
    """

    def __init__(self, cfg):
        super().__init__()
        self.depth, self.shift, self.budget_embedding = cfg.depth, cfg.shift, cfg.budget_embedding
        self.inp = nn.Linear(cfg.latent_channels, cfg.width)
        self.position = nn.Parameter(0.02 * torch.randn(cfg.frames, cfg.width))
        # c_noise spans 2.3 from sigma_min to sigma_max: wavelengths from 2 pi / 1 to 2 pi / 100, longer and far shorter.
        self.register_buffer("frequencies", torch.logspace(0, 2, cfg.width // 2))
        self.sigma_mlp = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.label_table = nn.Embedding(NUM_CLASSES + 1, cfg.width)  # the last row is the null label
        # Presto-L's second change: the budget is told, not guessed. Full depth is the padding row, always zero,
        # so that Presto-L at full depth is the plain DiT.
        self.budget_table = nn.Embedding(cfg.depth + 1, cfg.width, padding_idx=cfg.depth)
        nn.init.zeros_(self.budget_table.weight)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.final_norm = nn.LayerNorm(cfg.width, elementwise_affine=False, eps=1e-6)
        self.final_adaln = nn.Linear(cfg.width, 2 * cfg.width)
        self.final_out = nn.Linear(cfg.width, cfg.latent_channels)
        for layer in (self.final_adaln, self.final_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def runs(self, index, budget):
        """Whether block `index` runs: a bool for an int budget, booleans (batch,) for one a sample."""
        if budget is None:
            return True
        if self.shift:                                               # its rank: the last block is kept before block 0, 1, ...
            index = 0 if index == self.depth - 1 else index + 1
        return index < budget

    def forward(self, x, c_noise, label, budget=None, half=False):   # (batch, channels, frames)
        angles = c_noise[:, None] * self.frequencies                 # (batch or 1, width / 2)
        c = self.sigma_mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label_table(label)
        if self.budget_embedding and budget is not None:
            c = c + self.budget_table(torch.as_tensor(budget, device=x.device).reshape(-1))
        h, c = self.inp(x.mT) + self.position, F.silu(c)             # (batch, frames, width), (batch, width)
        for index, block in enumerate(self.blocks[: self.depth // 2] if half else self.blocks):
            keep = self.runs(index, budget)
            if torch.is_tensor(keep):
                h = torch.where(keep[:, None, None], block(h, c), h)
            elif keep:
                h = block(h, c)
        if half:
            return h
        shift, scale = self.final_adaln(c)[:, None].chunk(2, dim=-1)
        return self.final_out(self.final_norm(h) * (1 + scale) + shift).mT


# ================================================================================================
# Part 3. EDM: noise, preconditioning, sampler, guidance
# ================================================================================================
# THE CONTRACT. A denoiser is any callable
#
#     denoise(x, sigma, label) -> x0
#
# x: noisy latents (batch, channels, frames), that is x0 + sigma * noise; sigma: a scalar tensor, or one
# value a sample (batch,); label: (batch,) class indices, NULL_LABEL for none; x0: clean latents, of x's
# shape: the mean of all that fit x, or, if a generator answers, one sample of them. Teacher, fake score,
# generator, and the wrappers `guided` and `with_budget` below are all denoisers; samplers take any of them.


class Denoiser(nn.Module):
    """D_theta of EDM's equation 7: preconditioning around a DiT, so that its input and its target have
    unit variance at every noise level."""

    def __init__(self, cfg):
        super().__init__()
        self.sigma_data = cfg.sigma_data
        self.net = DiT(cfg)

    def forward(self, x, sigma, label, budget=None, half=False):
        sigma = sigma.reshape(-1, 1, 1)                              # a scalar broadcasts
        variance = sigma**2 + self.sigma_data**2
        c_in_x, c_noise = x / variance.sqrt(), sigma.flatten().log() / 4
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            F_x = self.net(c_in_x, c_noise, label, budget, half)
        return F_x.float() if half else c_skip * x + c_out * F_x.float()


def rho_schedule(u, cfg):
    """EDM's equation 5 made continuous: u in [0, 1] -> sigma, from sigma_max at 0 to sigma_min at 1."""
    high, low = cfg.sigma_max ** (1 / cfg.rho), cfg.sigma_min ** (1 / cfg.rho)
    return (high + u * (low - high)) ** cfg.rho


def edm_sigmas(steps, cfg):
    """The teacher's noise levels (steps + 1,): EDM's schedule, then 0."""
    u = torch.arange(steps) / max(steps - 1, 1)
    return torch.cat([rho_schedule(u, cfg), torch.zeros(1)])


def student_sigmas(steps, cfg):
    """The students' noise levels (steps,): the rho-schedule at u = i / (steps + 1), i = 0, 1, ... (our reading).

    EDM's own ends at sigma_min, where nothing is left to denoise: of four calls a student would waste the last.
    More calls fall where a tone is decided, too: for Presto-LS at 4 steps (seed 0, 100 updates) i / steps gave a
    Frechet distance of 0.72, i / (steps + 1/2) 0.52, this 0.29.
    """
    return rho_schedule(torch.arange(steps) / (steps + 1), cfg)


def draw_sigma(distribution, count, cfg, device):
    """Draw noise levels (count,) from p(sigma^train), p(sigma^inf), or four fixed levels, as DMD2 has."""
    if distribution == "train":                                      # EDM, table 1: ln sigma is Gaussian
        return (cfg.P_mean + cfg.P_std * torch.randn(count, device=device)).exp()
    if distribution == "inf":
        return rho_schedule(torch.rand(count, device=device), cfg)
    return student_sigmas(4, cfg).to(device)[torch.randint(4, (count,), device=device)]


def add_noise(x, sigma):
    """x + sigma * epsilon, with one sigma a sample, or one for all."""
    return x + sigma.reshape(-1, 1, 1) * torch.randn_like(x)


def dsm_loss(denoised, x, sigma, sigma_data):
    """EDM-weighted denoising score matching: lambda(sigma) ||D(x + n) - x||^2 (EDM, equations 2 and 8).

    `denoised` is what the denoiser made of x + sigma * noise. The weight makes every noise level count
    alike: it is 1 / c_out^2, so that this is the plain squared error of the inner network F_theta.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight.reshape(-1, 1, 1) * (denoised - x).square()).mean()


def guided(denoise, scale):
    """Classifier-free guidance: mu(x, null) + w (mu(x, label) - mu(x, null)), a denoiser again.

    w = 1 is the plain conditional denoiser, and costs no second evaluation; w = 0 ignores the label.
    """
    if scale == 1:
        return denoise

    def denoise_guided(x, sigma, label):
        sigma = sigma if sigma.ndim == 0 else sigma.repeat(2)
        both = denoise(x.repeat(2, 1, 1), sigma, torch.cat([label, torch.full_like(label, NULL_LABEL)]))
        conditional, null = both.chunk(2)
        return null + scale * (conditional - null)

    return denoise_guided


@torch.no_grad()
def sample_heun(denoise, x, sigmas, label):
    """Heun's second-order sampler (EDM, algorithm 1): 2 * steps - 1 evaluations.

    x is pure noise of standard deviation sigmas[0]; sigmas end with 0.
    """
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - denoise(x, sigma, label)) / sigma               # dx / dsigma
        euler = x + (following - sigma) * slope
        if following > 0:                                            # second order: the mean of both ends' slopes
            slope = (slope + (euler - denoise(euler, following, label)) / following) / 2
        x = x + (following - sigma) * slope
    return x


@torch.no_grad()
def sample_multistep(denoise, x, sigmas, label):
    """The students' sampler: denoise to x0, re-noise to the next sigma, repeat (as consistency models).

    One evaluation a step, never guided: what guidance there is was in the student's real score (generator_loss).
    The paper sees quality plateau near 4 steps and fall at 8 and 16. So does this toy, and here the reason can be
    heard: DMD leaves the generator a little too loud at middling noise (train_steps says why), every call starts
    from the last one's output, and so that compounds. At 4, 8 and 16 steps Presto-S has a Frechet distance of 0.25,
    0.74 and 3.42, and a loudness of -16.0, -15.0 and -13.1 dB, where real clips have -16.1 (README, row 2).
    """
    x0 = denoise(x, sigmas[0], label)
    for sigma in sigmas[1:]:
        x = x0 + sigma * torch.randn(x.shape).to(x.device)
        x0 = denoise(x, sigma, label)
    return x0


# ================================================================================================
# Part 4. Teacher
# ================================================================================================


def anneal(lr, step, total):
    """A hundred steps of warm-up, then flat, then a linear fall to zero over the last 60 %. While it falls samples
    become clean: a teacher had 48 % of its classes right before it, and all at its end."""
    return lr * min(1.0, (step + 1) / 100, (total - step) / (0.6 * total))


class Diverged(Exception):
    """A loss or gradient is no longer a number."""


def update(loss, optimizer, lr):
    """One optimizer step at learning rate `lr`, on the optimizer's own parameters and no others.

    `inputs=` keeps gradients out of every other network that the loss ran through: the generator's GAN term
    runs through the fake score's lower half and the head, and must not leave a trace there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not math.isfinite(norm):
        raise Diverged(f"the loss is {loss.item()}, its gradient's norm {norm.item()}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def averaged(model, decay):
    """An exponential moving average of a model's weights: the model that is sampled and saved. Its first update
    copies the weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


class LatentBank:
    """x_real: cfg.bank clips, encoded once, as a real project encodes its data set before it trains on it."""

    def __init__(self, vae, cfg, seed):
        generator = torch.Generator().manual_seed(seed)
        latents, labels = [], []
        with torch.no_grad():
            for start in range(0, cfg.bank, 64):
                wave, label = toy_data.make_batch(min(64, cfg.bank - start), generator)
                latents.append(vae.encode(wave.to(vae.mean.device)))
                labels.append(label)
        self.latents = torch.cat(latents)                            # (bank, channels, frames)
        self.labels = torch.cat(labels).to(self.latents.device)      # (bank,)

    def draw(self, count):
        """Latents (count, channels, frames) and their labels (count,), drawn at random."""
        index = torch.randint(len(self.labels), (count,)).to(self.labels.device)
        return self.latents[index], self.labels[index]


def drop_labels(label, share):
    """Replace a random share of the labels by the null label: CFG needs a denoiser for that too."""
    return torch.where(torch.rand(len(label), device=label.device) < share, NULL_LABEL, label)


def train_teacher(run, stage):
    """Train the teacher by denoising score matching; returns its averaged weights."""
    cfg, bank = run.cfg, run.bank
    model = run.place(Denoiser(cfg))
    ema = averaged(model, cfg.teacher_ema)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    for step in run.steps(stage, cfg.teacher_steps, model=model, ema=ema, optimizer=optimizer):
        x_real, label = bank.draw(cfg.batch)
        label = drop_labels(label, cfg.label_dropout)
        sigma = draw_sigma("train", cfg.batch, cfg, run.device)
        loss = dsm_loss(model(add_noise(x_real, sigma), sigma, label), x_real, sigma, cfg.sigma_data)
        update(loss, optimizer, anneal(cfg.teacher_lr, step, cfg.teacher_steps))
        ema.update_parameters(model)
        run.show(loss=loss)
        if run.listens(step, cfg.teacher_steps):
            run.show(right=run.right(stage, ema.module))
    return ema.module


# ================================================================================================
# Part 5. Presto-L: fewer layers where there is more noise
# ================================================================================================
# ASE ("a simple early exiting framework", Moon et al. 2024), for one who never read it: far from the data
# a denoiser only has to say roughly where the data is, and few blocks can do that. So a table says how
# many blocks run at each noise level, all of them near the data; a trained DiT is fine-tuned for it, each
# sample leaving the network at its own exit.
#
# Its weakness, says Presto!: a DiT's hidden state grows sharply in its last blocks and the output layer
# expects that, but an early exit shows it a hidden state from before. Hence `shift`, `budget_embedding`
# (see DiT), and a third change, in layer_loss: the full-depth pass teaches the short one.
#
# Here, at sigma = 15, the teacher's last block takes the variance from 18 to 125; ASE leaves with 12, Presto-L
# with 60. (The final LayerNorm repairs its size, but not that the output layer learnt to read what the last
# block wrote.) Yet variance is not all: ASE + shift has 80, and a Frechet distance of 1.41, where ASE has
# 0.81; only with L_st does the shift pay: 0.44 (medians of three seeds; README, row 8).


def budget_at(sigma, shares, cfg):
    """How many blocks run at this noise level: an int for a scalar sigma, (batch,) for one a sample.

    `shares` are fractions of the depth over equal bins of time, clean to noisy. Time is the position on
    the rho-schedule: what a sampler sees of the noise (our reading).
    """
    bins = len(shares)
    edges = rho_schedule(1 - torch.arange(1, bins) / bins, cfg)      # rising sigma
    edges = 0.999 * edges                                            # a level on an edge belongs to the noisier bin
    table = (torch.tensor(shares) * cfg.depth).round().long().clamp(1, cfg.depth)
    budget = table.to(sigma.device)[torch.bucketize(sigma, edges.to(sigma.device))]
    return int(budget) if sigma.ndim == 0 else budget


def with_budget(model, shares, cfg):
    """A model that runs only the blocks that its noise level deserves: a denoiser again. No shares: all blocks."""
    return model if shares is None else lambda x, sigma, label, **options: model(x, sigma, label, budget_at(sigma, shares, cfg), **options)


def layer_loss(model, x_real, label, sigma, budget, cfg):
    """Presto-L's loss: L_DSM of the shortened pass + self_teacher * L_st.

    L_st is the same weighted distance, from the short pass to the full-depth pass of the same weights on
    the same noisy input, without gradient: a target free of x_real's own randomness (our reading).
    self_teacher = 0 is ASE's loss.
    """
    x = add_noise(x_real, sigma)
    short = model(x, sigma, label, budget)
    loss = dsm_loss(short, x_real, sigma, cfg.sigma_data)
    if cfg.self_teacher > 0:
        with torch.no_grad():
            full = model(x, sigma, label)
        loss = loss + cfg.self_teacher * dsm_loss(short, full, sigma, cfg.sigma_data)
    return loss


def hidden_variances(model, x, sigma, label, budget):
    """Variances of the hidden state after each block that runs (a list): what Presto! means to preserve (abstract).
    After the last one come only a LayerNorm and the output layer."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, inputs, h: seen.append(h.var().item())) for block in model.net.blocks]
    model(x, sigma, label, budget)
    for hook in hooks:
        hook.remove()
    return seen


def train_layers(run, stage):
    """Train Presto-L, from the teacher; returns its averaged weights."""
    cfg, bank = run.cfg, run.bank
    model = run.load("teacher").requires_grad_(True)
    ema = averaged(model, cfg.teacher_ema)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    for step in run.steps(stage, cfg.layer_steps, model=model, ema=ema, optimizer=optimizer):
        x_real, label = bank.draw(cfg.batch)
        label = drop_labels(label, cfg.label_dropout)
        sigma = draw_sigma("train", cfg.batch, cfg, run.device)
        loss = layer_loss(model, x_real, label, sigma, budget_at(sigma, cfg.budgets, cfg), cfg)
        update(loss, optimizer, anneal(cfg.layer_lr, step, cfg.layer_steps))
        ema.update_parameters(model)
        run.show(loss=loss)
        if run.listens(step, cfg.layer_steps):
            run.show(right=run.right(stage, ema.module))
    return ema.module


# ================================================================================================
# Part 6. Presto-S and Presto-LS: fewer steps
# ================================================================================================
# A denoiser answers with the mean of all clean latents that fit what it sees: from pure noise that is a blur, and
# so a teacher is called many times. Presto-S makes of it a generator, whose single answer is a sample. No x_real
# is its target: it is the distribution of its answers that is pulled to the data's (DMD). And noise is used in
# four places: p_gen is what the generator will meet when it is sampled, "inf"; the three losses use "train",
# where the teacher learnt, and its copy the fake score (README, rows 4 and 5, has what happens otherwise).
#
# Read `train_steps` first: it calls what stands above it.


class Discriminator(nn.Module):
    """D_psi's head: four Conv1d blocks with GroupNorm and SiLU, then one channel (the paper's form).

    Its output (batch, frames / 8) is a sequence, about 2 values a second (2.8 in the paper), and not
    pooled: it says where a clip sounds wrong, not only that it does.
    """

    def __init__(self, cfg):
        super().__init__()
        w = cfg.width
        layers = []
        for stride in (1, 2, 2, 2):
            layers += [nn.Conv1d(w, w, 4 if stride == 2 else 3, stride, padding=1), nn.GroupNorm(4, w), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv1d(w, 1, 1))     # a 1x1 convolution: linear at each place

    def forward(self, hidden):                                       # (batch, frames, width)
        return self.layers(hidden.mT)[:, 0]                          # (batch, frames / 8)


def dmd_gradient(x_gen, sigma, label, real_score, fake_score):
    """The distribution-matching gradient on x_gen, one value an element (DMD2, as its code computes it).

    g = (mu_fake(x_t) - mu_real(x_t)) / mean|x_gen - mu_real(x_t)|,  x_t = x_gen + sigma * noise

    A denoiser is called a score because it is one in disguise: grad log p(x_t) = (mu(x_t) - x_t) / sigma^2
    (Tweedie). So fake - real is sigma^2 times a difference of scores, the gradient of KL(generated || real), both
    noised: descending it moves x_gen to what the real score expects, and away from what the generator makes too
    often. The KL is taken on the generator's own output, hence both look at that, never at x_real. Both give a
    direction there, not a finished sample, so neither need be good in one step. The divisor brings every noise
    level and sample to a comparable scale; where the scores agree, nothing pulls.
    """
    x_t = add_noise(x_gen, sigma)                                    # step 3
    real = real_score(x_t, sigma, label)                             # step 4, guided unless dmd_cfg_scale is 1
    fake = fake_score(x_t, sigma, label)                             # step 4
    return (fake - real) / (x_gen - real).abs().mean((1, 2), keepdim=True).clamp_min(1e-6)


def dmd_loss(x_gen, gradient):
    """A loss whose gradient is `gradient` (over the number of elements): 0.5 MSE to a stopped target."""
    return 0.5 * F.mse_loss(x_gen, (x_gen - gradient).detach())


def generator_loss(x_gen, label, real_score, fake_score, head, cfg):
    """L_DMD + nu1 * L_GAN, for the generator's update.

    `real_score` is the teacher, guided in the paper: mu(null) + w (mu(label) - mu(null)) with w = dmd_cfg_scale, so
    that the student has no need of guidance at inference; here w is 1 (README, row 7). The GAN term is least squares
    (paper): x_gen should be rated 1, "real". In a stage as short as ours it changes nothing that can be heard at the
    paper's weights, nor at ten times these, and harms at a hundred times (README, row 6).
    """
    count, device = len(x_gen), x_gen.device
    with torch.no_grad():
        gradient = dmd_gradient(x_gen, draw_sigma(cfg.p_dmd, count, cfg, device), label, real_score, fake_score)
    sigma = draw_sigma(cfg.p_gan, count, cfg, device)                # step 7
    rating = head(fake_score(add_noise(x_gen, sigma), sigma, label, half=True))   # step 8
    return dmd_loss(x_gen, gradient) + cfg.nu1 * (rating - 1).square().mean()


def fake_score_loss(x_gen, x_real, label, fake_score, head, cfg):
    """L_fake-DSM + nu2 * L_GAN, for the update of the fake score and its head.

    The first term keeps the fake score on the generator's distribution, the second makes its lower half
    and the head tell x_real (1) from x_gen (0); nu2 is small, so that it stays a denoiser. As in the DMD2 paper
    the features are the fake score's, not the teacher's: they follow the generator and its faults.
    """
    count, device = len(x_gen), x_gen.device
    sigma = draw_sigma(cfg.p_dsm, count, cfg, device)                # step 5
    loss = dsm_loss(fake_score(add_noise(x_gen, sigma), sigma, label), x_gen, sigma, cfg.sigma_data)   # step 6
    sigma = draw_sigma(cfg.p_gan, count, cfg, device).repeat(2)      # step 7
    both = torch.cat([x_gen, x_real])
    rating = head(fake_score(add_noise(both, sigma), sigma, label.repeat(2), half=True))   # step 8
    rating_gen, rating_real = rating.chunk(2)
    return loss + cfg.nu2 * (rating_gen.square().mean() + (rating_real - 1).square().mean())


def train_steps(run, stage):
    """Train Presto-S; or Presto-LS, whose generator starts from Presto-L and drops layers.

    Its two scores do not ("full-capacity score estimation", our reading): they are a measuring instrument, and
    cost nothing at inference. `ls_start` and `full_scores` are there to try the alternatives.

    Why sigma_max is 20: the fake score does not know from which noise level a clip was made, so DMD only matches
    the mixture over all of p_gen. Where noise hides everything, a generator answers with its class's mean, which is
    dull, and DMD makes up for that by making its other outputs too loud. With EDM's 80, outputs from sigma = 2.5
    had a standard deviation of 0.55 after 120 updates, where 0.50 is right, and clips of 4 steps (at u = i / 4)
    were 1 dB too loud. 20 leaves fewer dull ones: within 0.3 dB (Presto-S, seed 0).
    """
    cfg, bank, layers = run.cfg, run.bank, stage == "presto-ls"
    shares = cfg.budgets_ls if layers else None                      # of the blocks; None: all of them
    short_scores = layers and not cfg.full_scores
    scores, score_shares = ("presto-l", shares) if short_scores else ("teacher", None)
    model = run.load(cfg.ls_start if layers else "teacher").requires_grad_(True)
    generator = with_budget(model, shares, cfg)
    real_score = guided(with_budget(run.load(scores), score_shares, cfg), cfg.dmd_cfg_scale)
    head = Discriminator(cfg).to(run.device)
    fake = run.load(scores).requires_grad_(True)
    fake_score = with_budget(fake, score_shares, cfg)
    ema = averaged(model, cfg.student_ema)
    generator_optimizer = torch.optim.Adam(model.parameters(), fused=True)
    fake_optimizer = torch.optim.Adam([*fake.parameters(), *head.parameters()], fused=True)

    def make_x_gen():                                                # steps 1 and 2
        # Real latents at a continuous sigma, as in the paper's Figure 1: at sigma_max they are a fortieth of the
        # noise, so that pure noise is nothing new. DMD2 simulates its own sampler instead, to train on what
        # inference will show it; that costs calls, and fixes the step count. Its four fixed levels, tried here,
        # were worse at 4, 6 and 8 steps: at 8, a Frechet distance of 1.96, not 0.74 (README, row 5).
        x_real, label = bank.draw(cfg.student_batch)
        sigma = draw_sigma(cfg.p_gen, cfg.student_batch, cfg, run.device)
        return generator(add_noise(x_real, sigma), sigma, label), x_real, label

    for step in run.steps(stage, cfg.student_steps, model=model, ema=ema, fake=fake, head=head,
                          generator_optimizer=generator_optimizer, fake_optimizer=fake_optimizer):
        # Five to one, since the DMD gradient is only as true as the fake score is up to date. Here 1, 3, 5 and 6
        # gave a coverage of 0.82, 0.90, 0.90 and 0.91 at 4 steps: three would do. One, with the time saved spent on
        # more updates, is worse still: 0.78, and a Frechet distance of 0.62 where five have 0.25 (README, row 3).
        for _ in range(cfg.fake_updates):
            with torch.no_grad():
                x_gen, x_real, label = make_x_gen()
            loss_fake = fake_score_loss(x_gen, x_real, label, fake_score, head, cfg)
            update(loss_fake, fake_optimizer, cfg.fake_lr)
        x_gen, _, label = make_x_gen()
        loss = generator_loss(x_gen, label, real_score, fake_score, head, cfg)
        update(loss, generator_optimizer, cfg.generator_lr)
        ema.update_parameters(model)
        # Both losses only oscillate: they are an equilibrium. Only listening tells whether it works.
        run.show(loss=loss, fake=loss_fake)
        if run.listens(step, cfg.student_steps):
            run.show(right=run.right(stage, ema.module))
    return ema.module


# ================================================================================================
# Part 7. Generating and measuring: the same few lines for every model
# ================================================================================================


def is_student(name):
    """Whether a model is sampled in few steps, by re-noising, and without guidance.

    "undistilled" is the teacher sampled so: what Presto-S starts from, to see what distilling adds.
    """
    return name in ("presto-s", "presto-ls", "undistilled")


def default_steps(name, cfg):
    """How many steps a model is sampled in where nobody says."""
    return 4 if is_student(name) else cfg.teacher_sampling_steps


def sigmas_of(name, steps, cfg):
    """The noise levels that a model's sampler visits."""
    return (student_sigmas if is_student(name) else edm_sigmas)(steps, cfg)


def shares_of(name, cfg):
    """The shares of its blocks that a model runs, by noise level; None where it runs all."""
    return {"presto-l": cfg.budgets, "presto-ls": cfg.budgets_ls}.get(name)


def generate(name, model, label, steps, cfg):
    """Latents (batch, channels, frames) for labels (batch,), with noise from the global generator.

    Noise is drawn on the CPU, so that one seed means nearly one sound on every device.
    """
    denoise = with_budget(model, shares_of(name, cfg), cfg)
    sigmas = sigmas_of(name, steps, cfg).to(label.device)
    x = sigmas[0] * torch.randn(len(label), cfg.latent_channels, cfg.frames).to(label.device)
    if is_student(name):
        return sample_multistep(denoise, x, sigmas, label)
    return sample_heun(guided(denoise, cfg.cfg_scale), x, sigmas, label)


@torch.inference_mode()
def timed_clips(name, model, vae, label, steps, cfg):
    """Clips (batch, time) for labels (batch,), as a user waits for them: with the seconds of network and decoder."""
    synchronize = getattr(torch, vae.mean.device.type).synchronize   # torch.cuda's, torch.mps's or torch.cpu's
    start = time.perf_counter()
    latents = generate(name, model, label.to(vae.mean.device), steps, cfg)
    synchronize()
    middle = time.perf_counter()
    wave = vae.decode(latents)
    synchronize()
    return wave.float().cpu(), middle - start, time.perf_counter() - middle


def timed_median(name, model, vae, steps, cfg):
    """Seconds that network and decoder take for one clip: the medians of 20, after a warm-up."""
    times = [timed_clips(name, model, vae, torch.tensor([0]), steps, cfg)[1:] for _ in range(23)][3:]
    return tuple(statistics.median(column) for column in zip(*times))


def cost(name, steps, cfg):
    """Network passes a clip (guidance's two halves are one, of twice the batch), and mean blocks in each."""
    sigmas = sigmas_of(name, steps, cfg)
    if not is_student(name):
        sigmas = torch.cat([sigmas[:-1], sigmas[1:-1]])              # Heun looks at every level twice but the first
    return len(sigmas), budget_at(sigmas, shares_of(name, cfg) or (1.0,), cfg).float().mean().item()


# ================================================================================================
# Part 8. Runs: saving, resuming, checking. No lesson here.
# ================================================================================================
TRAIN = dict(zip(STAGES, [train_vae, train_teacher, train_layers, train_steps, train_steps]))


class Trouble(Exception):
    """Anything that the user can mend: becomes one line on stderr and exit status 2."""


def seed_with(*parts):
    """Seed every generator from any values. Each training step and each clip has a seed of its own: so an
    interrupted run ends as an uninterrupted one, and clip 3 is the same whatever --count is."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))


def write_file(path, data):
    """Write bytes under a temporary name and rename: no reader ever finds half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Trouble(f"cannot write {path}: {error.strerror}; choose another folder, or free some space")


class Run:
    """A folder of checkpoints, one a stage, and the progress bar of the stage that is training."""

    def __init__(self, folder, cfg, seed, device, save_every=60.0, compile=False):
        self.folder, self.cfg, self.seed, self.device = pathlib.Path(folder), cfg, seed, device
        self.save_every, self.compile, self.stop = save_every, compile, None

    @staticmethod
    def existing(folder, device):
        """A trained run, as its folder's config.json describes it."""
        file = pathlib.Path(folder, "config.json")
        try:
            about = json.loads(file.read_text())
            cfg = Config(**{f.name: f.type(about["config"].pop(f.name)) for f in dataclasses.fields(Config)}, **about["config"])
            return Run(folder, cfg, about["seed"], device)
        except FileNotFoundError:
            raise Trouble(f"{folder} holds no run: train one with `python presto.py train --out {folder}`")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Trouble(f"{file} is damaged, or of another version: start anew with `python presto.py train --out {folder} --fresh`")

    def differs(self, config, seed, stages):
        """What another config and seed have otherwise, of the seed and the knobs of these stages: a list of strings."""
        knobs = [(f.name, config[f.name], getattr(self.cfg, f.name)) for f in dataclasses.fields(Config) if f.metadata["stage"] in stages]
        return [f"{name} ({there} there, {here} here)" for name, there, here in [*knobs, ("seed", seed, self.seed)] if there != here]

    def open(self, first, fresh):
        """Make the folder ready to train: everything if `fresh`, else from stage `first` on, else what is missing.

        Two configs are never mixed in one folder. But from stage `first` on, all is trained again, and so what
        only matters from there on (a knob's `stage`) may change: that is what --stage is for.
        """
        again = STAGES if fresh else STAGES[STAGES.index(first):] if first else []
        if (self.folder / "config.json").exists() and not fresh:
            old = Run.existing(self.folder, self.device)
            differ = self.differs(dataclasses.asdict(old.cfg), old.seed, [stage for stage in STAGES if stage not in again])
            if differ:
                raise Trouble(f"{self.folder} holds a run with another config: {', '.join(differ)}; "
                              "choose another --out, or --fresh to start it anew")
        about = dict(config=dataclasses.asdict(self.cfg), seed=self.seed, device=str(self.device), torch=torch.__version__,
                     python=sys.version.split()[0], threads=torch.get_num_threads())
        with contextlib.suppress(OSError):                           # no git, no revision
            about["git"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent,
                                          capture_output=True, text=True).stdout.strip()
        try:
            for file in [self.path(stage, ending) for stage in again for ending in (".pt", ".partial.pt")]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise Trouble(f"cannot write in {self.folder}: {error.strerror}; choose another --out")
        write_file(self.folder / "config.json", json.dumps(about, indent=1).encode())

    # ---- what the training loops use ----------------------------------------------------------
    @functools.cached_property
    def vae(self):
        return self.load("vae")

    @functools.cached_property
    def bank(self):
        return LatentBank(self.vae, self.cfg, self.seed)

    def steps(self, stage, total, **parts):
        """Yield a stage's step numbers, from where an interrupted run stopped; save `parts` at intervals."""
        start = self.read(stage, ".partial.pt", **parts) if self.path(stage, ".partial.pt").exists() else 0
        saved, self.shown = time.monotonic(), {}
        with tqdm(total=total, initial=start, desc=f"{stage:9}", unit="step", dynamic_ncols=True) as self.bar:
            for step in range(start, total):
                self.where = f"{stage}, step {step} of {total}"
                if self.stop or time.monotonic() - saved > self.save_every:
                    self.save(stage, ".partial.pt", step, **parts)
                    saved = time.monotonic()
                if self.stop:
                    raise KeyboardInterrupt
                seed_with(self.seed, stage, step)
                yield step
                self.bar.update()
        seed_with(self.seed, stage, total)                           # for what a loop draws after its last step

    def show(self, **values):
        """Show figures at the bar's end: losses as they are now, `right` as it was last heard."""
        self.shown.update(values)
        if self.bar.n % 10 == 0 or "right" in values:
            self.bar.set_postfix({k: f"{torch.as_tensor(v).item():.3f}" for k, v in self.shown.items()}, refresh=False)

    def listens(self, step, total):
        """Whether to listen at this step: about six times a stage, and at its end."""
        return (step + 1) % max(total // 6, 1) == 0 or step + 1 == total

    def right(self, stage, model):
        """The sample metric while training: the share right of one clip of every class."""
        label = torch.arange(NUM_CLASSES)
        seed_with(self.seed, "listen")
        return share_right(timed_clips(stage, model, self.vae, label, default_steps(stage, self.cfg), self.cfg)[0], label)

    # ---- checkpoints --------------------------------------------------------------------------
    def train(self, stage):
        """Train one stage, save its model, and forget its partial checkpoint."""
        if stage != "vae":
            self.bank                                                # before seeding: it builds a VAE, from random weights
        seed_with(self.seed, stage, "start")                         # for the first weights
        self.save(stage, ".pt", None, model=TRAIN[stage](self, stage))
        self.path(stage, ".partial.pt").unlink(missing_ok=True)

    def path(self, stage, ending):
        return self.folder / (stage + ending)

    def save(self, stage, ending, step, **parts):
        """Write a checkpoint: a finished stage's model (".pt"), or all that is needed to go on (".partial.pt")."""
        buffer = io.BytesIO()
        torch.save(dict(config=dataclasses.asdict(self.cfg), seed=self.seed, step=step,
                        parts={name: part.state_dict() for name, part in parts.items()}), buffer)
        write_file(self.path(stage, ending), buffer.getvalue())

    def read(self, stage, ending, **parts):
        """Read a checkpoint into `parts`; returns its step. Never runs code from the file."""
        path, again = self.path(stage, ending), f"run `python presto.py train --out {self.folder}`"
        try:
            with zipfile.ZipFile(path) as archive:                   # torch's files are zips, with a sum for each part
                if archive.testzip():
                    raise zipfile.BadZipFile
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            if self.differs(saved["config"], saved["seed"], STAGES[: STAGES.index(stage) + 1]):   # its own knobs, and those before
                raise ValueError
            return saved["step"]
        except FileNotFoundError:
            raise Trouble(f"{path} does not exist: {again} first")
        except OSError as error:
            raise Trouble(f"cannot read {path}: {error.strerror}")
        except Exception:                                            # zip, zlib, pickle, torch: damage has many names
            raise Trouble(f"{path} is damaged, or not a checkpoint of this run's config: delete it and {again} again")

    def load(self, stage):
        """A finished stage's model, frozen, on this run's device."""
        model = self.place(VAE(self.cfg) if stage == "vae" else Denoiser(self.cfg))
        self.read(stage, ".pt", model=model)
        return model.eval().requires_grad_(False)

    def place(self, model):
        """A model on this run's device, compiled if that was asked for."""
        if self.compile:
            model.compile()
        return model.to(self.device)


# ================================================================================================
# Part 9. The command line
# ================================================================================================


def pick_device(name):
    """The device called `name`; auto takes cuda, then mps, then cpu."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *here):
        raise Trouble(f"--device {name}: not on this machine, which has {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def check_config(cfg):
    """Raise Trouble for values that contradict each other."""
    for wrong, why in (
            (cfg.width % 4 or cfg.width % cfg.heads, f"--width {cfg.width} must be a multiple of 4, and of --heads {cfg.heads}"),
            (cfg.stride % 2 or toy_data.CLIP_SAMPLES % cfg.stride or cfg.frames < 8,
             f"--stride {cfg.stride} must be even, and cut a clip's {toy_data.CLIP_SAMPLES} samples into 8 frames or more"),
            (cfg.sigma_min >= cfg.sigma_max, f"--sigma_min {cfg.sigma_min} must be below --sigma_max {cfg.sigma_max}")):
        if wrong:
            raise Trouble(why)


def command_train(args):
    if args.fresh and args.stage:
        raise Trouble("--fresh trains every stage anew, --stage some of them: choose one")
    if args.stage and STAGES.index(args.until) < STAGES.index(args.stage):
        raise Trouble(f"--until {args.until} comes before --stage {args.stage}")
    device = pick_device(args.device)
    preset = args.preset if args.preset != "auto" else "gpu" if device.type == "cuda" else "cpu"
    cfg = Config(**PRESETS[preset] | {name: value for name, value in vars(args).items() if name in Config.__dataclass_fields__})
    check_config(cfg)
    run = Run(args.out, cfg, args.seed, device, args.save_every, args.compile)
    run.open(args.stage, args.fresh)

    def stop(number, _):                                             # Run.steps sees it between two steps
        run.stop = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)                        # a second one ends it at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    start = time.monotonic()
    print(f"Training Presto! with the {preset} preset on {device}, seed {args.seed}, into {run.folder}", flush=True)
    for stage in STAGES[: STAGES.index(args.until) + 1]:
        if run.path(stage, ".pt").exists():
            print(f"{stage:9}: done before")
            continue
        try:
            run.train(stage)
        except KeyboardInterrupt:
            hint = " without --stage and --fresh, which start again" * bool(args.stage or args.fresh)
            print(f"\n{run.stop.name}: stopped and saved at {run.where}. To go on, run the same command{hint}.", file=sys.stderr)
            return 128 + run.stop
        except Diverged as trouble:
            raise Trouble(f"{run.where}: {trouble}; most likely its learning rate is too high. The stages before it are kept: "
                          f"lower it, and train again with --stage {stage}")
    after = f"sample --steps 4 --run {run.folder}" if args.until == STAGES[-1] else f"train --out {run.folder}, for the stages after"
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes. Now: python presto.py {after}")


def command_sample(args):
    try:
        labels = toy_data.parse_prompt(args.prompt)
    except ValueError as error:
        raise Trouble(str(error))
    run = Run.existing(args.run, pick_device(args.device))
    out = pathlib.Path(args.out)
    steps = args.steps or default_steps(args.model, run.cfg)
    model, vae = run.load(args.model), run.vae
    timed_clips(args.model, model, vae, torch.tensor(labels[:1]), steps, run.cfg)   # warm-up: the first is timed as the rest
    print(f"{args.model}, {steps} steps, seed {args.seed}\n{'file':20}{'asked':13}{'heard':13}{'cents':>5}{'tonal':>7}")
    right, times, shown = 0, [], {}
    for label in labels:
        asked = toy_data.PROMPTS[label]
        for index in range(args.count):
            seed_with(args.seed, label, index)
            wave, *seconds = timed_clips(args.model, model, vae, torch.tensor([label]), steps, run.cfg)
            peak = wave.abs().max().item()
            wave = wave / max(peak, 1.0)
            heard = toy_data.listen(wave)
            ok = toy_data.is_right(heard, torch.tensor([label]))[0].item()
            name = f"{asked.replace(' ', '-')}-{index:03d}.wav"
            write_file(out / name, toy_data.wav_bytes(wave[0]))
            print(f"{name:20}{asked:13}{toy_data.describe(heard):13}{heard['cents'].item():+5.0f}{heard['tonal'].item():7.2f}"
                  f"  {'right' if ok else 'WRONG'}" + f"  (peak {peak:.2f}, turned down so as not to clip)" * (peak > 1))
            if index < 4:                                            # a page of thousands would not open
                shown.setdefault(asked, []).append((name, wave[0]))
            right += ok
            times.append(seconds)
    network, decoder = (1000 * statistics.median(column) for column in zip(*times))
    summary = (f"{right} of {len(times)} right. A clip takes {network + decoder:.1f} ms (median; network {network:.1f}, decoder "
               f"{decoder:.1f}): {1000 * CLIP_SECONDS / (network + decoder):.0f} times real time on {run.device}.")
    write_file(out / "index.html", toy_data.page(f"{args.model}, {steps} steps", summary, [], shown).encode())
    print(f"{summary}\nTo see and hear them: {out / 'index.html'}")


@torch.inference_mode()
def command_eval(args):
    """The paper's table in miniature: every model of a run against real clips, and what each costs."""
    run = Run.existing(args.run, pick_device(args.device))
    cfg, vae, full = run.cfg, run.vae, run.cfg.teacher_sampling_steps
    label = torch.arange(NUM_CLASSES).repeat(args.count)

    def real(name):
        seed_with(args.seed, name)
        return toy_data.make_batch(len(label), labels=label)[0]

    reference, other = toy_data.embed(real("reference")), real("other")
    clips = {"real": other,                                          # the floor, and the ceiling of anything decoded
             "VAE": torch.cat([vae.decode(vae.encode(w.to(run.device))).cpu() for w in other.split(NUM_CLASSES)])}
    rows = {title: toy_data.score(wave, label, reference) for title, wave in clips.items()}

    wanted = [("teacher", n, cfg.cfg_scale) for n in sorted({4, 8, 16, 32, full})]
    wanted += [("teacher", full, 1.0)] * (cfg.cfg_scale != 1)
    wanted += [("presto-l", full, cfg.cfg_scale)]
    wanted += [(name, n, None) for name in ("undistilled", "presto-s", "presto-ls") for n in (1, 2, 3, 4, 6, 8, 16)]
    models = {name: run.load(name) for name in STAGES[1:] if name in ("teacher", args.model) or args.model == "all"}
    models["undistilled"] = models["teacher"]
    known_as = {} if cfg.shift or cfg.budget_embedding or cfg.self_teacher else {"presto-l": "ase"}
    timed = functools.cache(timed_median)                            # for the saturated teacher is a row, too
    saturated = timed("teacher", models["teacher"], vae, full, cfg)
    for name, steps, scale in tqdm([w for w in wanted if args.model in ("all", w[0])], desc="eval", unit="row"):
        c = cfg if scale is None else dataclasses.replace(cfg, cfg_scale=scale)
        seed_with(args.seed, "noise")                                # the same for every row
        waves, *seconds = zip(*(timed_clips(name, models[name], vae, part, steps, c) for part in label.split(NUM_CLASSES)))
        network, decoder = timed(name, models[name], vae, steps, c)
        passes, blocks = cost(name, steps, cfg)
        title = f"{known_as.get(name, name)}, {steps} step{'s' * (steps > 1)}" + ("" if scale is None else f", w = {scale:g}")
        clips[title] = torch.cat(waves)
        rows[title] = dict(
            toy_data.score(clips[title], label, reference), passes=passes, blocks=blocks, network_ms=1000 * network,
            decoder_ms=1000 * decoder, real_time=CLIP_SECONDS / (network + decoder), speedup=sum(saturated) / (network + decoder),
            batch_ms=1000 * statistics.median(map(sum, zip(*seconds))) / NUM_CLASSES)

    table = toy_data.table(rows)
    print(toy_data.aligned(table))
    floor = [toy_data.score(real(draw), label, reference) for draw in range(4)]
    floor = {c: (min(f[c] for f in floor), max(f[c] for f in floor)) for c in floor[0]}
    note = (f"{len(label)} clips a row, seed {args.seed}. Speed-up: one clip at a time, over the teacher at {full} steps; batch_ms: "
            f"milliseconds a clip, {NUM_CLASSES} at a time. Real against real, four draws: "
            + ", ".join(f"{c} {low:.2f} to {high:.2f}" for c, (low, high) in floor.items()))
    print(note)
    if "presto-l" in models:                                         # Presto-L's lesson: what does the output layer get to see?
        sigma = rho_schedule(torch.tensor(0.05), cfg).to(run.device)
        x, c = vae.encode(other[:NUM_CLASSES].to(run.device)), label[:NUM_CLASSES].to(run.device)
        for name, budget in (("teacher", cfg.depth), ("presto-l", cfg.depth), ("presto-l", budget_at(sigma, cfg.budgets, cfg))):
            variances = hidden_variances(models[name], add_noise(x, sigma), sigma, c, budget)
            print(f"Hidden variance after each block at sigma {sigma:.0f}, {known_as.get(name, name)} with {budget} of {cfg.depth} blocks: "
                  + ", ".join(f"{v:.2f}" for v in variances))
    part = "" if args.model == "all" else "-" + args.model           # beside the whole table, not over it
    write_file(run.folder / f"eval{part}.json", json.dumps(dict(rows=rows, floor=floor, count=args.count), indent=1).encode())
    shown = {p: toy_data.parse_prompt(p)[0] for p in ("A3 sine", "C4 organ", "E4 square", "G4 saw")}
    write_file(run.folder / f"report{part}.html", toy_data.page(
        f"Presto! on tones: {run.folder.name}", note, table,
        {p: [(title, wave[i]) for title, wave in clips.items()] for p, i in shown.items()}).encode())
    print(f"To see and hear it: {run.folder / f'report{part}.html'}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Trouble(f"{message} (see `{self.prog} -h`)")


def parse_as(kind, low, high):
    """An argparse type for one Config field or option, which says what it would have accepted."""
    read, wanted = {bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
                    tuple: (lambda text: tuple(map(float, text.split(","))), f"numbers from {low} to {high} with commas between"),
                    int: (int, f"a whole number from {low:g} to {high:g}"),
                    float: (float, f"a number from {low:g} to {high:g}")}[kind]

    def parse(text):
        with contextlib.suppress(KeyError, ValueError):
            value = read(text)
            if all(low <= v <= high for v in (value if kind is tuple else [value])):
                return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}")
    return parse


def make_parser():
    parser = Parser("presto.py", description=__doc__.partition("An unofficial")[0].strip(), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="train | sample | eval")

    def command(name, function, help, description, folder):
        sub = commands.add_parser(name, usage=f"presto.py {name} [options]", allow_abbrev=False, help=help, description=description)
        sub.add_argument("--seed", default=0, type=parse_as(int, 0, 2**31), help="the same seed gives the same bytes (default 0)")
        sub.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
        sub.add_argument(folder, default="runs/presto", help="the run's folder (default %(default)s)")
        sub.set_defaults(function=function)
        return sub

    sub = command("train", command_train, "train all stages, or go on where a run stopped",
                  "Train VAE, teacher, Presto-L, Presto-S and Presto-LS, in this order. Run it again to go on where it "
                  "stopped. Watch `right`, the share of sampled clips that sound as asked: the losses of the last two "
                  "stages only oscillate.", "--out")
    sub.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="auto: gpu on cuda, else cpu; tiny is for tests")
    sub.add_argument("--stage", choices=STAGES, help="train again from this stage on")
    sub.add_argument("--until", choices=STAGES, default=STAGES[-1], help="train no further than this stage (default %(default)s)")
    sub.add_argument("--fresh", action="store_true", help="forget what the folder holds and start anew")
    sub.add_argument("--compile", action="store_true", help="torch.compile the denoisers: needs a C++ compiler")
    sub.add_argument("--save_every", default=60.0, type=parse_as(float, 0, 1e9), help="seconds between checkpoints (default 60)")
    group = sub.add_argument_group("config", "the method's numbers and their reasons; the defaults shown are the cpu preset's")
    for field in dataclasses.fields(Config):
        default, why = ",".join(map(str, field.default)) if field.type is tuple else field.default, field.metadata["why"]
        kind = str if field.type is str else parse_as(field.type, field.metadata["low"], field.metadata["high"])
        group.add_argument(f"--{field.name}", type=kind, default=argparse.SUPPRESS, choices=field.metadata["choices"], metavar=field.type.__name__,
                           help=f"{why} (default {default})".replace("%", "%%"))

    sub = command("sample", command_sample, "write clips, and say what is heard in them",
                  "Write WAV files named by prompt; print for each what was asked and what is heard.", "--run")
    sub.add_argument("--steps", type=parse_as(int, 1, 1000), help="denoising steps (default 4; for a teacher, its own number)")
    sub.add_argument("--model", default="presto-ls", choices=STAGES[1:], help="which of the run's models (default %(default)s)")
    sub.add_argument("--prompt", default="all", help='a pitch and a timbre, such as "A3 saw", or all (default)')
    sub.add_argument("--count", default=1, type=parse_as(int, 1, 1000), help="clips a prompt (default 1)")
    sub.add_argument("--out", default="samples", help="where the WAVs go (default %(default)s)")

    sub = command("eval", command_eval, "measure every model of a run: one table, and a page to hear and see it",
                  "Print the paper's table in miniature, and write it as eval.json and report.html into the run's folder.", "--run")
    sub.add_argument("--count", default=16, type=parse_as(int, 2, 1000), help="clips of each of the 48 classes (default 16)")
    sub.add_argument("--model", default="all", choices=["all", "undistilled", *STAGES[1:]], help="only this model's rows (default all)")
    parser.set_defaults(function=lambda args: parser.print_help())   # no command: each command's own comes first
    return parser


def main(arguments=None):
    """Run one command; returns the exit status. Trouble becomes one line on stderr and status 2."""
    parser = make_parser()
    try:
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            knobs = list(Config.__dataclass_fields__) if args.command == "train" else []
            options = ["--" + name for name in {*vars(args), *knobs} - {"command", "function"}]
            near = "".join(f"did you mean {o}? " for o in difflib.get_close_matches(unknown[0][:40], options, 1))
            raise Trouble(f"unknown {unknown[0][:40]!r}: {near}See `presto.py {args.command or 'train'} -h`")
        return args.function(args) or 0
    except Trouble as trouble:
        print(f"presto.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npresto.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
