# SPDX-License-Identifier: MIT
"""What is true of the method: each test is a sentence about it. The first shows how to use it."""
import copy
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import soundfile
import torch
import torch.nn.functional as F

import presto
import toy_data

CFG = presto.Config(**presto.PRESETS["tiny"])
NULL, LABELS = len(toy_data.PROMPTS), torch.arange(6) * 7  # labels of a batch of six
SHAPE = (6, CFG.latent_channels, CFG.frames)

def test_usage_from_audio_to_latents_to_a_denoiser_to_a_wav_in_four_steps(tmp_path):
    cfg = presto.Config(**presto.PRESETS["tiny"])
    vae, denoiser = presto.VAE(cfg), presto.Denoiser(cfg)
    vae_optimizer, optimizer = (torch.optim.Adam(net.parameters()) for net in (vae, denoiser))
    for _ in range(3):  # thousands, to hear something
        wave, label = toy_data.make_batch(8)  # (8, samples), (8,)
        loss, _ = presto.vae_loss(vae, wave, cfg)
        presto.optimizer_step(loss, vae_optimizer, lr=1e-3)
        x_real = vae.encode(wave).detach()  # (8, channels, frames)
        sigma = presto.draw_sigma("train", len(label), cfg, "cpu")
        loss = presto.teacher_loss(denoiser, x_real, label, sigma, cfg)
        presto.optimizer_step(loss, optimizer, lr=1e-3)
    label, sigmas = torch.tensor([3]), presto.student_sigmas(4, cfg)  # A3 saw, four steps
    noise = sigmas[0] * torch.randn(1, cfg.latent_channels, cfg.frames)
    latents = presto.sample_multistep(denoiser, noise, sigmas, label)
    wave = vae.decode(latents).detach()  # (1, samples)
    (tmp_path / "A3-saw.wav").write_bytes(toy_data.wav_bytes(wave[0], toy_data.SAMPLE_RATE))
    assert soundfile.info(tmp_path / "A3-saw.wav").duration == 1.024  # seconds

# ---- Tools of the tests -------------------------------------------------------------------------
approx = pytest.approx
with_ = functools.partial(dataclasses.replace, CFG)
def near(a, b, atol=1e-4):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=atol)
def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
@torch.no_grad()
def awake(module):  # random weights for zero-initialised layers: nothing is zero by accident
    for name, parameter in module.named_parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "net.budget_table.weight":
            parameter[CFG.depth] = 0  # the padding row, as it always is
    return module
@pytest.fixture
def model():
    return awake(presto.Denoiser(CFG))
def record(module, calls):  # append the arguments of every later call of `module` to `calls`
    def note(module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        given.apply_defaults()
        calls.append(dict(given.arguments, module=module, grad=torch.is_grad_enabled()))
    module.register_forward_pre_hook(note, with_kwargs=True)
    return module
def budget_is(call, fractions):  # whether it ran what its noise level deserves; None: all blocks
    return str(call["budget"]) == str(fractions and presto.budget_at(call["sigma"], fractions, CFG))
def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]
def toy_latents(count):  # that need no sound: one number, -0.4 or 0.4 by class, + 0.3 * noise
    label = torch.randint(2, (count,))
    level = 0.8 * label - 0.4 + 0.3 * torch.randn(count)
    return level[:, None, None].expand(count, *SHAPE[1:]).clone(), label
class Bench:  # what a training loop asks of a Run, on toy latents; it notes all that happened
    device = torch.device("cpu")
    def __init__(self, cfg, **models):
        self.cfg, self.models, self.latents = cfg, models, self
        self.loaded, self.calls, self.rates, self.history, self.drawn = [], [], [], [], []
    def sample_batch(self, count):
        self.drawn.append(toy_latents(count))
        return self.drawn[-1]
    def load(self, stage):
        self.loaded.append(stage)
        return record(copy.deepcopy(self.models[stage]).requires_grad_(False), self.calls)
    def loop(self, stage, total, **state):
        self.state, net = state, next(iter(state.values()))  # the network that is trained
        if not self.loaded:
            record(net, self.calls)
        for i in range(total):
            torch.manual_seed(i)
            yield i
            self.history.append(weights(net))
            self.rates.append([state[name].param_groups[0]["lr"] for name in
                               ("optimizer", "fake_optimizer") if name in state])
    def log(self, *models, **values):
        pass
    def calls_of(self, *names):  # of "generator", "fake", and "real", which is neither
        names_of = {id(self.state["net"]): "generator", id(self.state["fake"]): "fake"}
        calls = [dict(call, name=names_of.get(id(call["module"]), "real")) for call in self.calls]
        return [call for call in calls if call["name"] in names]

TOY = with_(w=1.0, wrong_captions=0.0, teacher_updates=200, teacher_lr=1e-2, ema=0.95, batch=32,
            student_batch=32)
@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return presto.train_teacher(Bench(TOY)).eval().requires_grad_(False)

def levels(denoise, sigmas, sampler, label):
    x = sigmas[0] * torch.randn(256, *SHAPE[1:])
    level = sampler(denoise, x, sigmas, torch.full((256,), label)).mean((1, 2))
    return level.mean().item(), level.std().item()

# ---- Toy data and measures ----------------------------------------------------------------------
def test_the_ear_hears_real_tones_right_and_the_factors_that_vary_within_a_class():
    label = torch.arange(20 * NULL) % NULL
    wave, _ = toy_data.make_batch(len(label), labels=label)
    assert wave.abs().max() < 1 and toy_data.is_correct(wave, label).float().mean() > 0.99
    wrong = toy_data.misname(label)  # the pitch is right, the timbre is any other
    assert same(wrong // 4, label // 4) and set((wrong - label).tolist()) == {-3, -2, -1, 1, 2, 3}
    heard = toy_data.listen(toy_data.make_batch(64, labels=torch.full((64,), 3))[0])  # A3 saw
    factors = torch.stack([heard[name] for name in toy_data.HEARD])  # each varies, and by itself
    assert factors.std(1).min() > 1 and (factors.corrcoef() - torch.eye(4)).abs().max() < 0.7

def test_haze_is_the_level_of_the_noise_under_a_tone():
    tone, noise = torch.sin(2 * math.pi * 262 * torch.arange(8192) / 8000), torch.randn(16, 8192)
    for share in (0.1, 0.01, 0.001):  # of the tone's power, 0.5
        haze = toy_data.listen(tone + (0.5 * share) ** 0.5 * noise)["haze"].mean().item()
        assert haze == approx(10 * math.log10(share / (1 + share)), abs=0.6)

def test_frechet_distance_and_mmd_are_the_closed_forms():
    a, b = torch.randn(2, 20_000, 4, dtype=torch.float64)
    assert toy_data.frechet_distance(3 * a + 3, b) == approx(4 * (3**2 + (3 - 1) ** 2), rel=0.03)
    a, b = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.0]])  # the median within b is 2
    expected = 1000 * (1 + math.exp(-1 / 2) - 2 * math.exp(-1 / 8))
    assert toy_data.mmd(a, b) == approx(expected, abs=1e-3)

def test_recall_and_coverage_of_points_on_a_line_are_counted_by_hand():
    real = torch.tensor([[0.0], [1], [2], [10]])  # with k = 1 the radii are 1, 1, 1, 8
    fake = torch.tensor([[0.4], [0.6], [20], [20.5]])  # and these 0.2, 0.2, 0.5, 0.5
    assert toy_data.recall_coverage(fake, real, k=1) == (0, 0.5)

def test_wasserstein_is_how_far_values_must_move_and_within_class_std_sees_no_other_class():
    a, b = torch.tensor([0.0, 1, 2]), torch.tensor([1.0])
    assert [toy_data.wasserstein(a, x) for x in (a.flip(0) + 5, b)] == approx([5, 2 / 3])
    values, label = torch.tensor([0.0, 2, 100, 104, 7]), torch.tensor([0, 0, 1, 1, 2])
    assert toy_data.within_class_std(values, label) == approx(math.sqrt((2 + 8) / 2))

def test_one_clip_per_class_repeated_is_correct_but_bad_in_recall_coverage_and_spread():
    label = torch.arange(NULL).repeat(16)
    real, other = (toy_data.make_batch(len(label), labels=label)[0] for _ in range(2))
    reference = toy_data.Reference(toy_data, real, label)
    good = toy_data.measure(toy_data, other, label, reference)
    collapsed = toy_data.measure(toy_data, other[:NULL].repeat(16, 1), label, reference)
    assert good["accuracy"] > 0.98 and collapsed["accuracy"] > 0.95
    assert good["recall"] > 0.8 and good["coverage"] > 0.8 and 0.9 < good["spread"] < 1.1
    assert collapsed["recall"] < 0.3 and collapsed["coverage"] < 0.5 and collapsed["spread"] < 0.01
    for ref in (reference, toy_data.Reference(toy_data, 0 * real, label)):  # with silence
        assert all(map(math.isfinite, toy_data.measure(toy_data, 0 * real, label, ref).values()))

# ---- Part 1. VAE --------------------------------------------------------------------------------
def test_the_vae_loss_is_relative_error_plus_spectrum_plus_kl_and_finite_for_silence():
    vae, wave = presto.VAE(CFG), toy_data.make_batch(4)[0]
    vae.mean[:], vae.scale[:] = 3, 2  # how latents are normalised does not matter
    loss, _ = presto.vae_loss(vae, wave * torch.tensor([[0.0], [1], [1], [1]]), CFG)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in vae.parameters())
    gain = torch.tensor([[-1.0], [1], [0.5], [-3]])  # phase is forgiven; all clips count alike
    assert presto.stft_distance(gain * wave, wave).item() == approx((0.5**2 + 2**2) / 4, abs=1e-4)
    log_std = torch.linspace(-2, 1, CFG.latent_channels)
    with torch.no_grad():
        for parameter in (*vae.join.parameters(), *vae.encoder[-1].parameters()):
            parameter.zero_()
        vae.join.bias.fill_(0.1)  # the output is a constant
        vae.encoder[-1].bias.copy_(torch.cat([torch.full_like(log_std, 1.5), log_std]))
    posterior, unit = (torch.distributions.Normal(*p) for p in ((1.5, log_std.exp()), (0.0, 1.0)))
    kl = torch.distributions.kl_divergence(posterior, unit).mean().item()
    record(vae.decoder[0], calls := [])
    loss, error = presto.vae_loss(vae, wave, with_(kl_weight=2.0))
    e = ((0.1 - wave).square().sum(1) / wave.square().sum(1)).mean().item()
    spectra = presto.stft_distance(torch.full_like(wave, 0.1), wave).item()
    assert [error.item(), loss.item()] == approx([e, e + 0.2 * spectra + 2 * kl], rel=1e-4)
    drawn = calls[0]["input"]  # latents (batch, frames, channels)
    assert near(drawn.std((0, 1)).log(), log_std, 0.4) and near(drawn[..., 0].mean(), 1.5, 0.1)

def test_a_vae_block_starts_as_the_identity_and_then_hears_one_frame_to_each_side():
    block, h, bump = presto.ResidualBlock(8), torch.randn(1, 9, 8), torch.zeros(1, 9, 8)
    bump[0, 4, 0] = 1
    assert torch.equal(block(h), h)
    moved = (awake(block)(h + bump) - block(h)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [3, 4, 5]
    block.conv.requires_grad_(False).weight[:8], block.conv.bias[:8] = 0, 0  # a * silu(b): no a
    assert near(block(h), h + block.out.bias)

def test_the_vae_learns_and_its_latents_have_mean_0_and_deviation_sigma_data():
    bench = Bench(with_(vae_updates=60, vae_width=32, vae_batch=16, vae_lr=5e-3))
    vae, (wave, _) = presto.train_vae(bench).requires_grad_(False), toy_data.make_batch(256)
    assert presto.vae_loss(vae, wave, bench.cfg)[1] < 0.8  # 1 is silence
    latents, (mean, _) = vae.encode(wave), vae.posterior(wave)
    assert near(latents.mean((0, 2)), 0.0, 0.1) and near(latents.std((0, 2)), CFG.sigma_data, 0.08)
    assert near(latents * vae.scale + vae.mean, mean)
    assert near(vae.decode(latents), vae.join(vae.decoder(mean.mT).mT)[:, 0])
    assert bench.rates == [[presto.lr_at(i, 60, 5e-3)] for i in range(60)]

# ---- Part 2. DiT --------------------------------------------------------------------------------
def test_a_block_starts_as_the_identity_and_then_is_dits_with_torchs_own_attention():
    block, h, c = presto.Block(16, 2), torch.randn(3, 7, 16), torch.randn(3, 16)
    assert torch.equal(block(h, c), h)
    awake(awake(block))  # twice, so that gates are large
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln(c)[:, None].chunk(6, -1)
    x = (F.layer_norm(h, (16,), eps=1e-6) * (1 + scale1) + shift1).transpose(0, 1)
    attended, _ = F.multi_head_attention_forward(
        x, x, x, 16, 2, block.qkv.weight, block.qkv.bias, None, None, False, 0.0,
        block.out.weight, block.out.bias)
    middle = h + gate1 * attended.transpose(0, 1)
    x = F.layer_norm(middle, (16,), eps=1e-6) * (1 + scale2) + shift2
    assert near(block(h, c), middle + gate2 * block.mlp(x))

def test_the_network_is_told_positions_labels_noise_levels_and_budgets(model):
    x, c_noise = torch.randn(SHAPE), torch.full((6,), 0.1)
    out, told = model.net(x, c_noise, LABELS), model.net(x, c_noise, LABELS, 3)
    model.net.cfg = with_(budget_embedding=False)  # as for ASE
    others = (model.net(x, c_noise, LABELS + 1), model.net(x, 2 * c_noise, LABELS),
              model.net(x.flip(-1), c_noise, LABELS).flip(-1))
    assert not any(near(out, other) for other in others)
    assert not near(told, model.net(x, c_noise, LABELS, 3))
    new = presto.DiT(CFG)  # its blocks are the identity: only the last layer can hear the label
    awake(new.final_adaln), awake(new.final_out)
    assert not near(new(x, c_noise, LABELS), new(x, c_noise, LABELS + 1))

def test_a_full_budget_is_the_plain_dit_and_training_never_moves_its_row(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    for budget, is_plain in ((CFG.depth, True), (2, False)):
        many = torch.full((6,), budget)
        assert near(model(x, sigma, LABELS, many), model(x, sigma, LABELS)) == is_plain
        model(x, sigma, LABELS, many).sum().backward()
        assert (model.net.budget_table.weight.grad[budget].abs().max() == 0) == is_plain
    assert presto.Denoiser(CFG).net.budget_table.weight.abs().max() == 0  # starts as the teacher

@pytest.mark.parametrize("keep_last, runs", [(True, [0, 1, 3]), (False, [0, 1, 2])])
def test_presto_l_always_runs_the_last_block_and_ase_leaves_early(keep_last, runs):
    calls, model = [], presto.Denoiser(with_(keep_last=keep_last))
    for block in model.net.blocks:
        record(block, calls)
    model(torch.randn(SHAPE), torch.tensor(1.0), LABELS, 3)  # skipped blocks are not run at all
    assert [list(model.net.blocks).index(call["module"]) for call in calls] == runs

def test_masking_in_training_equals_skipping_at_inference(model):
    x, sigma, budgets = torch.randn(SHAPE), torch.rand(6) + 0.5, [1, 2, 3, 4, 2, 1]
    masked = model(x, sigma, LABELS, torch.tensor(budgets))
    for i in range(6):
        assert near(masked[[i]], model(x[[i]], sigma[[i]], LABELS[[i]], budgets[i]))

def test_features_are_the_hidden_state_halfway_and_are_judged_as_a_sequence(model):
    x, sigma, seen = torch.randn(SHAPE), torch.rand(6) + 0.5, []
    record(model.net.blocks[2], seen)
    model(x, sigma, LABELS)
    features = model(x, sigma, LABELS, return_features=True)
    assert torch.equal(features, seen[0]["h"]) and len(seen) == 1  # the upper half does not run
    assert awake(presto.Discriminator(CFG))(features).shape == (6, CFG.frames // 8)

# ---- Part 3. EDM --------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 80.0])
def test_preconditioning_gives_the_network_input_and_target_of_unit_variance(sigma):
    x, level = CFG.sigma_data * torch.randn(2000, *SHAPE[1:]), torch.full((2000,), sigma)
    noisy, label = presto.add_noise(x, level), torch.zeros(2000, dtype=torch.long)
    assert (noisy - x).std() == approx(sigma, rel=0.02)
    new, calls = presto.Denoiser(CFG), []  # its output layer says 0, so that D = c_skip x
    record(new.net, calls)
    with torch.no_grad():
        missing = x - new(noisy, level, label)
        torch.nn.init.ones_(new.net.final_out.bias)  # a network that says 1 adds c_out
        c_out = (missing - (x - new(noisy, level, label))).mean()
    assert c_out.item() == approx(0.5 * sigma / math.hypot(sigma, 0.5), rel=1e-3)
    assert calls[0]["x"].std() == approx(1, rel=0.02) == (missing / c_out).std()
    assert calls[0]["c_noise"][0].item() == approx(math.log(sigma) / 4)
    loss = presto.dsm_loss(x - missing, x, level, CFG)
    assert loss.item() == approx(1, rel=0.05)  # every level counts alike

def test_schedules_end_where_they_should_p_inf_is_the_students_and_p_train_is_log_normal():
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7  # EDM's equation 5 with its own numbers
    assert presto.edm_sigmas(3, CFG).tolist() == approx([80, middle, 0.002, 0], rel=1e-3)
    assert near(presto.student_sigmas(4, CFG), presto.edm_sigmas(6, CFG)[:4])  # the end is left out
    drawn, numbers = presto.draw_sigma("inf", 100_000, CFG, "cpu"), range(1, 9)  # of steps
    visited = torch.cat([presto.student_sigmas(n, CFG).repeat(840 // n) for n in numbers])
    for sigma in (40, 10, 3, 1, 0.3, 0.08):
        assert near((drawn > sigma).float().mean(), (visited > sigma).float().mean(), 0.08)
    for kind, factor in ((CFG.p_dsm, 1), ("train", 1), (CFG.p_gan, 1 / 5), ("low", 1 / 5)):
        log = (presto.draw_sigma(kind, 100_000, CFG, "cpu") / factor).log()
        assert near(log.mean(), CFG.P_mean, 0.03) and near(log.std(), CFG.P_std, 0.028)
    levels = presto.draw_sigma("discrete", 1000, CFG, "cpu").unique()
    assert levels.tolist() == approx(presto.student_sigmas(4, CFG).flip(0).tolist())

def test_guidance_is_the_papers_formula_and_without_parallel_turns_but_does_not_stretch(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    cond, null = model(x, sigma, LABELS), model(x, sigma, torch.full((6,), NULL))
    assert presto.guided(model, with_(w=1.0)) is model  # at half the cost
    for w in (0.0, 0.5, 3.0):
        paper, turned, half = (presto.guided(model, with_(w=w, parallel=share))(x, sigma, LABELS)
                               for share in (1.0, 0.0, 0.5))
        assert near(paper, null + w * (cond - null)) and near(half, (paper + turned) / 2)
        assert near(((turned - cond) * cond).sum((1, 2)), 0.0, 1e-3)  # of each clip by itself
        length = ((paper - turned) * cond).sum((1, 2)) / cond.square().sum((1, 2))
        assert near(paper - turned, length[:, None, None] * cond)  # nothing else is taken away

def test_heun_with_the_true_denoiser_turns_noise_into_data_with_an_error_of_second_order():
    def ideal(x, sigma, label):  # for data that is N(2, 0.5^2)
        return (0.5**2 * x + sigma**2 * 2) / (0.5**2 + sigma**2)
    x, errors = CFG.sigma_max * torch.randn(512, 1, 1, dtype=torch.float64), []
    for steps in (64, 128):
        out = presto.sample_heun(ideal, x, presto.edm_sigmas(steps, CFG), None)
        errors.append((out - 2 - (x - 2) * 0.5 / math.hypot(0.5, CFG.sigma_max)).abs().mean())
    assert errors[1] < 0.002 and 3.5 < errors[0] / errors[1] < 4.5

# ---- Part 4. The training helpers and the teacher -----------------------------------------------
def test_the_learning_rate_rises_stays_and_falls_over_the_last_60_percent():
    rates = [presto.lr_at(i, 1000, 2.0) for i in (0, 12, 25, 399, 700, 999)]
    assert rates == approx([2 / 25, 2 * 13 / 25, 2, 2, 1, 2 / 600])

def test_an_optimizer_step_clips_the_gradient_obeys_lr_and_moves_nothing_else():
    mine, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = torch.optim.SGD([mine], lr=123.0)
    for slope, step in ((1000.0, 0.5), (0.1, 0.1)):  # a gradient of norm 2000, then of 0.2
        before = mine.detach().clone()
        presto.optimizer_step((slope * mine * other).sum(), optimizer, lr=1.0)
        assert near(before - mine, step)
    assert other.grad is None and torch.equal(other, torch.ones(4))

@pytest.mark.parametrize("stage, decay", [*zip(presto.STAGES[1:], (0.6, 0.7, 0.7, 0.7))])
def test_a_stage_returns_the_average_of_its_weights_with_its_rates_and_null_labels(stage, decay):
    is_student, updates = stage in presto.MULTISTEP, ("teacher", "layer", "student")
    cfg = with_(ema=0.6, student_ema=0.7, batch=8 if is_student else 256, self_teacher=0.0,
                label_dropout=0.25, wrong_captions=0.4, **{f"{n}_updates": 5 for n in updates})
    bench = Bench(cfg, **{name: awake(presto.Denoiser(cfg)) for name in presto.STAGES[1:]})
    trained, mean = presto.TRAIN[stage](bench), bench.history[0]
    for new in bench.history[1:]:
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, new)]
    assert all(near(a, b, 1e-6) for a, b in zip(weights(trained), mean))
    lr = {"teacher": cfg.teacher_lr, "presto-l": cfg.layer_lr}.get(stage, cfg.generator_lr)
    assert bench.rates == [[presto.lr_at(i, 5, lr)] + [cfg.fake_lr] * is_student for i in range(5)]
    if not is_student:  # learns under p_train
        label, sigma = (torch.cat([call[k] for call in bench.calls]) for k in ("label", "sigma"))
        assert (label == NULL).float().mean().item() == approx(0.25, abs=0.04)
        truth = torch.cat([label for _, label in bench.drawn])[label != NULL]
        assert (label[label != NULL] != truth).float().mean().item() == approx(0.4, abs=0.06)
        assert near(sigma.log().mean(), cfg.P_mean, 0.15) and near(sigma.log().std(), cfg.P_std, .1)
        fractions, start = (cfg.fractions, ["teacher"] * 2) if stage == "presto-l" else (None, [])
        assert all(budget_is(call, fractions) for call in bench.calls) and bench.loaded == start

def test_the_training_set_is_real_clips_with_their_labels():
    vae = awake(presto.VAE(CFG)).requires_grad_(False)
    latents = presto.Latents(vae, with_(clips=100), 7)
    wave, label = toy_data.make_batch(64, torch.Generator().manual_seed(7))
    assert torch.equal(latents.label[:64], label) and near(latents.x[:64], vae.encode(wave))
    x, label = latents.sample_batch(8)
    index = (x.flatten(1)[:, None] == latents.x.flatten(1)).all(-1).int().argmax(1)
    assert torch.equal(label, latents.label[index]) and len(latents.x) == len(latents.label) == 100

# ---- Part 5. Presto-L ---------------------------------------------------------------------------
def test_the_budget_falls_as_the_noise_grows_as_in_ases_table():
    cfg, expected = with_(depth=28), [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]  # published
    fractions = [round(blocks / 28, 2) for blocks in expected]
    middles = presto.rho_schedule(1 - (torch.arange(10) + 0.5) / 10, cfg)
    assert presto.budget_at(middles, fractions, cfg).tolist() == expected
    on_edges = presto.rho_schedule(torch.arange(1, 10) / 10, cfg)  # the noisier bin decides
    assert presto.budget_at(on_edges, fractions, cfg).tolist() == expected[:0:-1]
    assert presto.budget_at(torch.tensor(80.0), (1, 0.01), CFG) == 1  # never none

def test_the_self_teacher_pulls_the_short_pass_to_the_full_one_and_not_back(model, teacher):
    x_real, sigma, losses = torch.randn(SHAPE), torch.full((6,), 5.0), []
    for weight in (0.0, 3.0):
        torch.manual_seed(1)
        cfg = with_(fractions=(0.5,), self_teacher=weight)  # budget 2: blocks 0 and 3
        losses.append(presto.layer_loss(teacher, model, x_real, LABELS, sigma, cfg))
    losses[1].backward()
    assert not any(p.grad.any() for p in model.net.blocks[2].parameters() if p.grad is not None)
    torch.manual_seed(1)
    x = presto.add_noise(x_real, sigma)
    short, full = model(x, sigma, LABELS, 2), teacher(x, sigma, LABELS)
    ase, gap = (presto.dsm_loss(short, to, sigma, CFG).item() for to in (x_real, full))
    assert gap > 1e-3 and [loss.item() for loss in losses] == approx([ase, ase + 3 * gap], rel=1e-4)

# ---- Part 6. Presto-S and Presto-LS -------------------------------------------------------------
def a_score_of(answer, seen):  # it always answers the same; its features are the noisy input
    def score(x, sigma, label, return_features=False):
        seen.append((x, sigma))
        return x.mT if return_features else torch.zeros_like(x) + answer
    return score

def test_the_dmd_gradient_leads_from_fake_to_real_and_autograd_delivers_it_exactly():
    real, x_gen = torch.arange(1, 7.0)[:, None, None], torch.zeros(6, 40, 50, requires_grad=True)
    sigma, seen = torch.tensor([0.1, 0.5, 1, 2, 5, 20]), []
    scores = a_score_of(real, seen), a_score_of(-1.0, seen)
    g = presto.dmd_gradient(x_gen, sigma, LABELS, *scores)
    assert near(g, ((-1 - real) / real).expand(g.shape))  # x_gen goes against it
    assert torch.equal(seen[0][0], seen[1][0]) and near(seen[0][0].std((1, 2)) / sigma, 1.0, 0.1)
    presto.dmd_loss(x_gen, g).backward()
    assert near(x_gen.grad * x_gen.numel(), g)
    assert not presto.dmd_gradient(x_gen, sigma, LABELS, scores[0], scores[0]).any()  # they agree

def test_each_loss_of_presto_s_is_a_sum_over_noised_latents_and_every_part_has_its_gradient():
    cfg, seen, x_real = with_(nu1=0.5, nu2=2.0), [], torch.full(SHAPE, 5.0, requires_grad=True)
    x_gen, head = torch.full(SHAPE, 3.0, requires_grad=True), torch.nn.Identity()
    real, fake = a_score_of(1.0, []), a_score_of(4.0, seen)
    presto.generator_loss(x_gen, LABELS, real, fake, head, cfg).backward()
    assert near(x_gen.grad * x_gen.numel(), (4 - 1) / (3 - 1) + 0.5 * 2 * (seen[1][0] - 1), 1e-3)
    loss = presto.fake_score_loss(x_gen, x_real, LABELS, fake, head, cfg)
    (_, dsm), (a, level), (b, same_level) = seen[2:]  # DSM's answer is 4, its target 3
    gan = a.square().mean() + (b - 1).square().mean()  # 0 for generated ones, 1 for real ones
    assert near(loss, presto.dsm_loss(4.0, x_gen, dsm, cfg) + 2 * gan, 1e-3 * loss.item())
    for x, slope in zip((a, b), torch.autograd.grad(loss, (x_gen, x_real))):  # through features
        assert near((slope * x.numel()).std((1, 2)) / x.std((1, 2)), 2 * 2.0, 1e-2)
    for (x, sigma), clean in zip(seen, (3, 3, 3, 3, 5)):
        assert near(((x - clean) / sigma[:, None, None]).std(), 1.0, 0.15)
    assert torch.equal(level, same_level)
    level, share = torch.tensor([0, 0.1, 0.5, 1, 10]), [1, 0.25 / 0.26, 0.5, 0.2, 0.25 / 100.25]
    loss = presto.anchor_loss(x_gen[:5], x_real[:5], level, cfg)  # x_real's share of the input
    assert near(loss, (3 - 5) ** 2 * sum(part**2 for part in share) / 5)

def student_bench(stage="presto-s", **changes):
    cfg = with_(student_updates=3, warm_updates=4, fake_updates=2, **changes)
    bench = Bench(cfg, **{name: awake(presto.Denoiser(cfg)) for name in presto.STAGES[1:4]})
    bench.trained = presto.train_student(bench, stage)
    return bench

def test_the_fake_score_and_head_warm_up_then_learn_so_often_per_generator_update():
    bench = student_bench()
    has_graph = [call["grad"] for call in bench.calls_of("generator")]
    assert has_graph == [False] * 4 + [True] + ([False] * 2 + [True]) * 2
    optimizer = bench.state["fake_optimizer"]
    trained = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert trained == {id(p) for name in ("fake", "head") for p in bench.state[name].parameters()}
    steps = [state["step"].item() for state in optimizer.state.values()]  # of what has a gradient:
    assert set(steps) == {4 + 2 + 2} and len(steps) == len(trained) - 1  # all but budget_table

@pytest.mark.parametrize("where", ["p_gen", "p_dmd", "p_dsm", "p_gan"])
def test_each_of_the_four_noise_distributions_is_used_in_its_own_place(where):
    places = {"p_gen": [], "p_dmd": [], "p_dsm": [], "p_gan": []}
    bench = student_bench(**dict.fromkeys(places, "inf") | {where: "train"}, P_mean=8.0, P_std=0.0)
    for call in bench.calls_of("generator", "fake", "real"):
        kind = "p_gan" if call["return_features"] else "p_dsm" if call["grad"] else "p_dmd"
        place = "p_gen" if call["name"] == "generator" else kind
        places[place].append(bool((call["sigma"] > 1000).all()))  # e^8; the others end at 80
    assert all(set(seen) == {place == where} for place, seen in places.items())

def test_the_generator_sees_noised_real_latents_and_a_guided_score():
    bench, null = student_bench(p_gen="discrete"), [NULL] * CFG.student_batch
    for call, (x_real, label) in zip(bench.calls_of("generator"), bench.drawn):
        noise = (call["x"] - x_real) / call["sigma"][:, None, None]
        assert noise.std().item() == approx(1, abs=0.15) and torch.equal(call["label"], label)
        assert torch.isin(call["sigma"], presto.student_sigmas(4, CFG)).all()
    assert all(call["label"].tolist()[len(null) :] == null for call in bench.calls_of("real"))

def test_the_fake_score_alone_is_told_the_generators_level_if_so_chosen():
    bench, last, given = student_bench(), None, []
    for call in bench.calls_of("generator", "fake", "real"):
        last = call if call["name"] == "generator" else last
        assert (call["sigma_gen"] is last["sigma"]) == (call["name"] == "fake")
        assert torch.equal(call["label"][: len(last["label"])], last["label"])
    record(bench.state["fake"].net.gen_level, given)
    x, sigma = torch.randn(SHAPE), torch.ones(6)
    a, b = (bench.state["fake"](x, sigma, LABELS, sigma_gen=s * sigma) for s in (0.1, 10.0))
    assert not near(a, b) and near(given[1]["c_noise"], math.log(10) / 4)
    assert student_bench(tell_level=False).state["fake"].net.gen_level is None

@pytest.mark.parametrize("stage, start, score, changes", [
    ("presto-s", "teacher", "teacher", {"full_scores": False}),
    ("presto-ls", "presto-l", "teacher", {}),
    ("presto-ls", "presto-s", "teacher", {"ls_start": "presto-s"}),
    ("presto-ls", "presto-l", "presto-l", {"full_scores": False})])
def test_each_student_has_its_start_its_layers_and_its_scores(stage, start, score, changes):
    bench = student_bench(stage, generator_lr=0.0, fractions_ls=(1, 0.5), **changes)
    assert same(weights(bench.trained), weights(bench.models[start]))
    assert sorted(bench.loaded) == sorted([start, score, score])
    budgets = {"presto-l": CFG.fractions, "presto-ls": (1, 0.5)}
    for call in bench.calls_of("generator", "fake", "real"):
        assert budget_is(call, budgets.get(stage if call["name"] == "generator" else score))

def test_the_teacher_learns_means_in_one_step_and_presto_s_learns_samples(teacher):
    cfg = dataclasses.replace(TOY, student_updates=40, warm_updates=20, generator_lr=3e-3,
                              fake_lr=6e-3, student_ema=0.8)
    student = presto.train_student(Bench(cfg, teacher=teacher), "presto-s")
    one, eight = presto.student_sigmas(1, CFG), presto.edm_sigmas(8, CFG)
    for label, mean in ((0, -0.4), (1, 0.4)):  # with a deviation of 0.3
        sampled = levels(teacher, eight, presto.sample_heun, label)
        assert sampled[0] == approx(mean, abs=0.15) and sampled[1] == approx(0.3, abs=0.12)
        assert levels(teacher, one, presto.sample_multistep, label)[1] < 0.12
        sampled = levels(student, one, presto.sample_multistep, label)
        assert sampled[0] == approx(mean, abs=0.2) and 0.13 < sampled[1] < 0.5
    assert near(presto.variance_by_level(student, *toy_latents(512), torch.tensor(0.3)), 1.0, 0.15)

def test_multistep_sampling_renoises_to_exactly_the_next_sigma_and_ends_with_an_answer():
    seen, sigmas, noise = [], presto.student_sigmas(4, CFG), torch.randn(64, 4, 16)
    out = presto.sample_multistep(a_score_of(7.0, seen), sigmas[0] * noise, sigmas, None)
    assert [x.std() / sigma for x, sigma in seen] == approx([1.0] * 4, rel=0.05)
    noises = [(x - 7) / sigma for x, sigma in seen[1:]]  # fresh ones
    assert [n.mean().item() for n in noises] == approx([0.0] * 3, abs=0.06) and (out == 7).all()
    assert (noises[0] * noises[1]).mean().abs() < 0.06 > (noises[1] * noises[2]).mean().abs()

# ---- Part 7. Generating and measuring -----------------------------------------------------------
def test_students_are_called_once_per_step_unguided_and_teachers_by_heun_with_guidance(model):
    vae, calls = awake(presto.VAE(CFG)), []
    record(model, calls)
    budgets = {"presto-l": (1, 0.75), "presto-ls": (1, 0.5)}
    cfg = with_(fractions=budgets["presto-l"], fractions_ls=budgets["presto-ls"])
    for name in ("teacher", "presto-l", "re-noised", "presto-s", "presto-ls"):
        calls.clear()
        wave, _ = presto.make_clips(name, model, vae, LABELS, 3, cfg)
        a, b, c = presto.edm_sigmas(3, cfg)[:3].tolist()
        is_teacher = name in ("teacher", "presto-l")
        expected = [a, b, b, c, c] if is_teacher else presto.student_sigmas(3, cfg).tolist()
        assert [call["sigma"].item() for call in calls] == approx(expected)
        assert (calls[0]["x"].std() / 80).item() == approx(1, rel=0.15) and wave.shape == (6, 8192)
        for call in calls:
            assert call["label"].tolist() == LABELS.tolist() + [NULL] * 6 * is_teacher
            assert budget_is(call, budgets.get(name))

def test_variance_by_level_is_that_of_answers_within_classes_over_that_of_the_data():
    def denoise(x, sigma, label):
        mean = 0.8 * label[:, None, None] - 0.4
        return mean + sigma / 0.15 * (x - mean)  # twice, if asked at the right level
    ratio = presto.variance_by_level(denoise, *toy_latents(256), torch.tensor(0.3))
    assert ratio == approx(2**2 * 2, rel=0.15)  # of the data, and of as much noise

# ---- Part 8. Runs and the command line ----------------------------------------------------------
TRAIN = ["train", "--preset", "tiny", "--device", "cpu", "--out"]
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert presto.main([*TRAIN, str(folder)]) == 0
    return folder
@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")
def sample(run, out, *options):
    assert presto.main([*f"sample --run {run} --out {out} --device cpu".split(), *options]) == 0
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.wav"))}
def weights_in(folder, stages="*"):
    return [weight for path in sorted(folder.glob(f"{stages}.pt"))
            for weight in torch.load(path)["state"]["model"].values()]

def test_an_interruption_in_every_stage_ends_bit_for_bit_as_none(trained, tmp_path, monkeypatch):
    stopped, seeds = [], set()
    class Stops(presto.Run):
        def log(self, model=None, **values):
            seeds.add(torch.initial_seed())  # all 15 updates differ in what they draw
            super().log(model, **values)
            if self.update == 1 and self.stage not in stopped:
                stopped.append(self.stage)
                raise KeyboardInterrupt
    monkeypatch.setattr(presto, "Run", Stops)
    status = [presto.main([*TRAIN, str(tmp_path), "--save_every", "0"]) for _ in range(6)]
    assert status == [130] * 5 + [0] and stopped == presto.STAGES and len(seeds) == 15
    assert same(weights_in(trained), weights_in(tmp_path))

def test_a_run_refuses_other_settings_of_finished_stages_and_takes_those_of_later(folder, capsys):
    before, had = weights_in(folder, "presto-s"), sorted(folder.iterdir())
    for options, changed, named in ((["--nu1", "0.5"], "nu1 (0.3 there, 0.5 here)", "presto-s"),
            (["--stage", "presto-s", "--ema", "0.5"], "ema (0.998 there", "teacher"),
            (["--stage", "presto-l", "--seed", "3"], "seed (0 there, 3 here)", "vae")):
        assert presto.main([*TRAIN, str(folder), *options]) == 2 and sorted(folder.iterdir()) == had
        says = f"{named}.pt was [^;]*: {re.escape(changed)}.* --stage {named}\n$"
        assert re.search(says, capsys.readouterr().err)  # the first file that the change spoils
    again = [*TRAIN, str(folder), "--stage", "presto-s", "--until", "presto-s"]
    assert presto.main([*again, "--nu1", "0.5"]) == 0 and not (folder / "presto-ls.pt").exists()
    assert presto.main(again) == 0 and same(weights_in(folder, "presto-s"), before)

def test_sample_writes_wavs_in_range_and_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    saved = torch.load(folder / "vae.pt")
    saved["state"]["model"]["join.weight"] *= 1e4  # so loud that it must be turned down
    torch.save(saved, folder / "vae.pt")
    one, three, other = (sample(folder, tmp_path / out, "--prompt", "c4 organ", *options.split())
                         for out, options in (("a", "--seed 5"), ("b", "--seed 5 --count 3"),
                                              ("c", "--seed 6 --model teacher")))
    name = "C4-organ-000.wav"
    assert one[name] == three[name] != other[name] and len(set(three.values())) == 3
    wave, rate = soundfile.read(tmp_path / "a" / name)
    assert rate == 8000 and 0.99 < abs(wave).max() and (abs(wave) > 0.999).sum() <= 2

def test_eval_measures_every_model_with_its_own_layers_on_the_same_noise(folder, monkeypatch):
    shutil.copy(folder / "teacher.pt", folder / "presto-s.pt")  # one that learnt nothing
    calls, load, make_clips, late = {}, presto.Run.load, presto.make_clips, iter([1, 1, 9])
    monkeypatch.setattr(presto.Run, "load", lambda run, stage: record(
        load(run, stage), [] if stage == "vae" else calls.setdefault(stage, [])))
    monkeypatch.setattr(presto, "make_clips", lambda *args, label, steps, cfg: (
        make_clips(*args, label, steps, cfg)[0], steps * cfg.w * next(late, 1) + len(label)))
    assert presto.main(["eval", "--run", str(folder), "--count", "1", "--device", "cpu"]) == 0
    fractions = {"presto-l": CFG.fractions, "presto-ls": CFG.fractions_ls}
    assert all(budget_is(call, fractions.get(s)) for s in presto.STAGES[1:] for call in calls[s])
    rows, plot = json.loads((folder / "eval.json").read_text(), parse_constant=pytest.fail).values()
    assert rows["real"]["accuracy"] == 1 and 0.5 < rows["real"]["coverage"] < 1
    assert rows["re-noised, 4 steps"] == rows["presto-s, 4 steps"] and "r, 12 steps" in str(rows)
    plain, guided = (rows[f"teacher, 4 steps, w = {w}"] for w in (1, 1.5))
    assert plain["fd"] != guided["fd"] and guided["alone"] == guided["batch"] == 1
    assert plain["alone"] == 7 / 5 and plain["batch"] == 54 / 52 and [*plot] == presto.STAGES[1:]
    lines = re.findall('points="(.*?)"', (folder / "report.html").read_text())
    curves = [[float(point.split(",")[0]) for point in line.split()] for line in lines]
    assert all(curve == sorted(curve, reverse=True) for curve in curves)  # from noisy, from slow
    assert list(map(len, curves)) == [8] * 4 + [4, 1, 5, 5, 5]  # w = 1 is left out
    table = toy_data.table({"a": {"fd": 0.1234, "haze": -3.21}, "b": {"W_attack": 1.234}})
    assert table[1:] == [["a", "0.123", "-3.2", ""], ["b", "", "", "1.23"]]

BURSTS = '''
import torch
SAMPLE_RATE, CLIP_SAMPLES, PROMPTS = 4000, 4096, ["one", "two", "three"]
def make_batch(count, generator=None, labels=None):
    labels = torch.randint(3, (count,), generator=generator) if labels is None else labels
    part = torch.arange(CLIP_SAMPLES) * 2 * (labels[:, None] + 1) // CLIP_SAMPLES
    wave = torch.randn(count, CLIP_SAMPLES, generator=generator) * (part % 2 == 0) / 10
    wave[0] = 0  # a silent clip
    return wave, labels
'''
def test_another_data_module_without_pitch_goes_through_all_commands(tmp_path, monkeypatch, capsys):
    (tmp_path / "bursts.py").write_text(BURSTS)
    monkeypatch.syspath_prepend(tmp_path)
    run, train = tmp_path / "run", [*TRAIN, str(tmp_path / "run"), "--data"]
    assert presto.main([*train, "bursts"]) == 0
    assert list(sample(run, tmp_path / "wavs", "--prompt", "two")) == ["two-000.wav"]
    assert presto.main(["eval", "--run", str(run), "--count", "8", "--device", "cpu"]) == 0
    rows = json.loads((run / "eval.json").read_text())["rows"]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert "accuracy" not in rows["real"] and rows["real"]["fd"] < rows["presto-ls, 4 steps"]["fd"]
    assert presto.main([*train, "toy_data"]) == 2
    assert "data (bursts there, toy_data here)" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["bursts"], "PROMPTS", ["one", "two"])
    for command in ([*train, "bursts"], ["sample", f"--run={run}"]):
        assert presto.main(command) == 2 and "prompts (" in (says := capsys.readouterr().err)
        assert says.endswith("--stage vae\n")  # the first stage that the change spoils

@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; run with SLOW=1")
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    long = ["--vae_updates", "60", "--teacher_updates", "60", "--layer_updates", "60"]
    assert presto.main([*TRAIN, str(tmp_path / "whole"), *long]) == 0
    train, killed = [*TRAIN, str(tmp_path / "killed"), *long, "--save_every", "0"], 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, presto.__file__, *train], stdout=-1)
        process.stdout.readline()  # "Training ...": from now on, any moment will do
        time.sleep(0.2 * torch.rand(()).item())
        process.kill()
        killed += process.wait() == -9
    assert killed > 5 and presto.main(train) == 0
    assert same(weights_in(tmp_path / "whole"), weights_in(tmp_path / "killed"))

def test_a_full_disk_gets_one_line_and_leaves_the_old_file_and_no_half_of_a_new(tmp_path, capsys):
    presto.write_file(tmp_path / "file", b"old")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(presto.UserError, match="cannot write"):
            presto.write_file(tmp_path / "file", bytes(20_000))
        assert presto.main([*TRAIN, str(tmp_path / "run")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capsys.readouterr().err.splitlines()[-1].startswith("presto.py: cannot write")
    assert (tmp_path / "file").read_bytes() == b"old" and sorted(tmp_path.rglob("*.*")) == []

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)
@pytest.mark.parametrize("how", ["missing", "flipped", "crafted", "no weight", "no module", "half"])
def test_a_spoilt_checkpoint_gets_one_line_naming_it(folder, tmp_path, capsys, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path, saved = folder / "presto-ls.pt", torch.load(folder / "presto-ls.pt")
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        saved["update"] = 1 if how == "half" else "done"
        saved["state"]["model"].pop("net.position" if how == "no weight" else None, None)
        saved["facts"]["data"] = "no_such" if how == "no module" else "toy_data"
        torch.save(Bomb() if how == "crafted" else saved, path)
    if how == "missing":
        path.unlink()
    assert presto.main(["sample", "--run", "run", "--out", "out", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    says = ["no_such"] if how == "no module" else ["presto-ls.pt", "train"]
    assert error.count("\n") == 1 and all(word in error for word in says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "bomb-went-off").exists()
    status = presto.main(["eval", "--run", "run", "--count", "1", "--device", "cpu"])
    assert status == (0 if how in ("missing", "half") else 2)  # eval leaves these out

@pytest.mark.parametrize("option, value, says", [("--p_dmd", "low", "low"), ("--ema", "2", "to 1"),
    ("--width", "18", "multiple of 4"), ("--stride", "96", "8 whole frames"), ("--batch", "0", "1"),
    ("--rho", "nan", "from 1"), ("--data", "no_such", "no_such"), ("--device", "x", "--device x"),
    ("--vae_lr", "1e9", "vae, up"), ("--vae_update", "3", "update"), ("--fractions", "[]", "[]")])
def test_bad_options_get_status_2_a_line_and_no_file(tmp_path, capsys, option, value, says):
    with pytest.raises(SystemExit, match="^2$"):  # argparse exits by itself
        sys.exit(presto.main([*TRAIN, str(tmp_path / "run"), option, value]))
    assert says in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()
