"""What must be true of the method, each test a sentence about it: `python -m pytest` runs all on a CPU in a minute.

Read the names as a summary of presto.py; break a line there, and see which sentence is no longer true.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import soundfile
import torch

import presto
import toy_data
from toy_data import NULL_LABEL, NUM_CLASSES

CFG = presto.Config(**presto.PRESETS["tiny"])
ASE = dataclasses.replace(CFG, shift=False, budget_embedding=False, self_teacher=0.0)
SHAPE = (6, CFG.latent_channels, CFG.frames)          # of every batch of latents here
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes a minute or more; run with SLOW=1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def awake(model, scale=0.1):
    """Give zero-initialised layers random weights, so that nothing is zero by accident."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


@pytest.fixture
def model():
    model = awake(presto.Denoiser(CFG))
    with torch.no_grad():
        model.net.budget_table.weight[CFG.depth] = 0  # the padding row, as it always is
    return model


def labels(count=6):
    return torch.arange(count) * 7 % NUM_CLASSES


# ---- the toy world ------------------------------------------------------------------------------


def test_listening_is_right_about_real_tones():
    wave, label = toy_data.make_batch(20 * NUM_CLASSES, labels=torch.arange(20 * NUM_CLASSES) % NUM_CLASSES)
    heard = toy_data.listen(wave)
    both, _, timbre = toy_data.is_right(heard, label)
    assert both.float().mean() > 0.99 and timbre.float().mean() >= 0.98
    assert (heard["cents"].abs() < 20).float().mean() >= 0.99
    assert wave.abs().max() < 1


def test_noise_and_silence_and_wrong_tones_are_not_right():
    label = torch.arange(NUM_CLASSES)
    wave, _ = toy_data.make_batch(NUM_CLASSES, labels=label)
    for other in (torch.randn_like(wave), torch.zeros_like(wave), wave.roll(4, 0), wave.roll(1, 0)):
        assert toy_data.is_right(toy_data.listen(other), label)[0].float().mean() < 0.05


def test_within_one_class_the_envelope_pitch_loudness_and_brightness_vary():
    heard = toy_data.listen(toy_data.make_batch(64, labels=torch.full((64,), 3))[0])     # A3 saw
    assert heard["cents"].std() > 1.5 and heard["loudness"].std() > 1.5 and heard["brightness"].std() > 0.01
    assert heard["attack"].std() > 0.005 and heard["decay"].std() > 5


def test_prompts_are_read_as_typed():
    for label, prompt in enumerate(toy_data.PROMPTS):
        assert toy_data.parse_prompt(f"  {prompt.upper()} ") == [label]
    assert toy_data.parse_prompt("all") == list(range(NUM_CLASSES))
    with pytest.raises(ValueError, match="did you mean A3 saw"):
        toy_data.parse_prompt("saw a3")


# ---- EDM ----------------------------------------------------------------------------------------


def test_a_denoiser_leaves_clean_latents_alone(model):
    x = torch.randn(SHAPE)
    assert torch.allclose(model(x, torch.tensor(1e-5), labels()), x, atol=1e-4)


def test_preconditioning_gives_the_network_unit_variance_input_and_target():
    x = CFG.sigma_data * torch.randn(4000, CFG.latent_channels, CFG.frames)
    for sigma in (0.01, 0.5, 3.0, 80.0):
        noisy = presto.add_noise(x, torch.full((4000,), sigma))
        # A new network's output layer says 0, so that D = c_skip x; what is then missing, over c_out, is its target.
        zero, seen = presto.Denoiser(CFG), []
        zero.net.register_forward_pre_hook(lambda net, inputs: seen.extend(inputs[:2]))
        with torch.no_grad():
            missing = x - zero(noisy, torch.tensor(sigma), labels(4000))
        network_input, c_noise = seen
        assert network_input.std() == pytest.approx(1, rel=0.02)
        assert c_noise.item() == pytest.approx(math.log(sigma) / 4)
        c_out = sigma * CFG.sigma_data / math.hypot(sigma, CFG.sigma_data)
        assert (missing / c_out).std() == pytest.approx(1, rel=0.02)
        before = zero(noisy[:6], torch.tensor(sigma), labels())
        torch.nn.init.ones_(zero.net.final_out.bias)   # a network that says 1: what is added to D is c_out
        assert torch.allclose(zero(noisy[:6], torch.tensor(sigma), labels()) - before, torch.tensor(c_out), rtol=1e-3)


def test_the_loss_weight_makes_every_noise_level_count_alike():
    x = CFG.sigma_data * torch.randn(2000, CFG.latent_channels, CFG.frames)
    zero = presto.Denoiser(CFG)
    for sigma in (0.02, 0.5, 20.0):
        sigma = torch.full((2000,), sigma)
        with torch.no_grad():
            denoised = zero(presto.add_noise(x, sigma), sigma, labels(2000))
        assert presto.dsm_loss(denoised, x, sigma, CFG.sigma_data).item() == pytest.approx(1, rel=0.05)


def test_the_schedules_fall_from_sigma_max_and_end_where_they_should():
    for steps in (1, 2, 4, 16):
        teacher, student = presto.edm_sigmas(steps, CFG), presto.student_sigmas(steps, CFG)
        assert len(teacher) == steps + 1 and len(student) == steps
        assert teacher[0] == pytest.approx(CFG.sigma_max) and student[0] == pytest.approx(CFG.sigma_max)
        assert teacher[-1] == 0 and (teacher.diff() < 0).all() and (student.diff() < 0).all()
        assert torch.allclose(student, presto.rho_schedule(torch.arange(steps) / (steps + 1), CFG))
        if steps > 1:
            assert teacher[-2] == pytest.approx(CFG.sigma_min, rel=1e-3) and student[-1] > CFG.sigma_min
    # EDM's equation 5 with its own numbers, at the middle of three steps.
    assert presto.edm_sigmas(3, dataclasses.replace(CFG, sigma_max=80.0))[1] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, rel=1e-4)


def test_p_inf_is_the_schedule_made_continuous_and_p_train_is_log_normal():
    schedule = presto.edm_sigmas(2001, CFG)[:-1].sort().values
    drawn = presto.draw_sigma("inf", 200_000, CFG, "cpu")
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert drawn[:100_000].quantile(q) == pytest.approx(schedule.quantile(q).item(), rel=0.05)
    log = presto.draw_sigma("train", 100_000, CFG, "cpu").log()
    assert log.mean() == pytest.approx(CFG.P_mean, abs=0.03) and log.std() == pytest.approx(CFG.P_std, rel=0.02)
    four = presto.draw_sigma("four", 1000, CFG, "cpu").unique()
    assert four.tolist() == pytest.approx(presto.student_sigmas(4, CFG).sort().values.tolist())


def test_guidance_at_0_ignores_the_label_at_1_is_plain_and_extrapolates_beyond(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    plain, null = model(x, sigma, labels()), model(x, sigma, torch.full((6,), NULL_LABEL))
    assert torch.allclose(presto.guided(model, 0)(x, sigma, labels()), null, atol=1e-5)
    assert torch.allclose(presto.guided(model, 1)(x, sigma, labels()), plain, atol=1e-5)
    assert torch.allclose(presto.guided(model, 3)(x, sigma, labels()), null + 3 * (plain - null), atol=1e-5)


def test_sigma_may_be_a_scalar_or_one_a_sample(model):
    x = torch.randn(SHAPE)
    for denoise in (model, presto.guided(model, 2.0), presto.with_budget(model, CFG.budgets, CFG)):
        assert torch.allclose(denoise(x, torch.tensor(20.0), labels()), denoise(x, torch.full((6,), 20.0), labels()), atol=1e-5)


def test_heun_with_the_true_denoiser_turns_noise_into_data():
    # For data N(m, s^2) the ideal denoiser is known, and so is where the ODE must end.
    m, s = 2.0, 0.5
    ideal = lambda x, sigma, label: (s**2 * x + sigma**2 * m) / (s**2 + sigma**2)
    x = CFG.sigma_max * torch.randn(512, 1, 1, dtype=torch.float64)
    out = presto.sample_heun(ideal, x, presto.edm_sigmas(128, CFG), None)
    exact = m + (x - m) * s / math.hypot(s, CFG.sigma_max)
    assert torch.allclose(out, exact, atol=0.002)
    # Second order: twice the steps, about a quarter of the error.
    error = lambda n: (presto.sample_heun(ideal, x, presto.edm_sigmas(n, CFG), None) - exact).abs().mean()
    assert 3.5 < error(64) / error(128) < 4.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree_on_fixed_latents(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    on_cpu = model(x, sigma, labels())
    on_gpu = model.cuda()(x.cuda(), sigma.cuda(), labels().cuda()).cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=0.05)   # bfloat16 there, float32 here


# ---- DiT and Presto-L ---------------------------------------------------------------------------


def calls_of(blocks, run):
    """Which blocks `run()` calls, in order."""
    called, handles = [], []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_hook(lambda *_, index=index: called.append(index)))
    run()
    for handle in handles:
        handle.remove()
    return called


def test_at_the_start_every_block_is_the_identity():
    net = presto.DiT(CFG)
    h, c = torch.randn(2, CFG.frames, CFG.width), torch.randn(2, CFG.width)
    assert torch.equal(net.blocks[0](h, c), h)


def test_a_full_budget_is_the_plain_dit(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    plain = model(x, sigma, labels())
    assert torch.equal(model(x, sigma, labels(), CFG.depth), plain)
    assert torch.allclose(model(x, sigma, labels(), torch.full((6,), CFG.depth)), plain, atol=1e-6)


def test_training_never_moves_the_budget_row_of_full_depth(model):
    for budget, moved in ((CFG.depth, False), (2, True)):
        sigma = torch.rand(6) + 0.5
        presto.layer_loss(model, torch.randn(SHAPE), labels(), sigma, torch.full((6,), budget), ASE).backward()
        assert (model.net.budget_table.weight.grad[budget].abs().max() > 0) == moved


def test_presto_l_always_runs_the_last_block_and_ase_does_not(model):
    x, sigma = torch.randn(SHAPE), torch.tensor(1.0)
    run = lambda: model(x, sigma, labels(), 2)
    assert calls_of(model.net.blocks, run) == [0, CFG.depth - 1]     # skipped blocks are not run at all
    model.net.shift = False
    assert calls_of(model.net.blocks, run) == [0, 1]


def test_hidden_variances_are_those_of_the_blocks_that_run(model):
    x, sigma, seen = torch.randn(SHAPE), torch.tensor(3.0), []
    handle = model.net.blocks[-1].register_forward_hook(lambda m, i, out: seen.append(out.var()))
    variances = presto.hidden_variances(model, x, sigma, labels(), 3)
    handle.remove()
    assert len(variances) == 3 and variances[-1] == pytest.approx(seen[0].item())
    assert len(presto.hidden_variances(model, x, sigma, labels(), None)) == CFG.depth and not model.net.blocks[0]._forward_hooks


@pytest.mark.parametrize("shift", [True, False])
def test_masking_in_training_equals_skipping_at_inference(model, shift):
    model.net.shift = shift
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    budget = torch.tensor([1, 2, 3, 4, 2, 1])
    masked = model(x, sigma, labels(), budget)
    for i, b in enumerate(budget.tolist()):
        assert torch.allclose(masked[i : i + 1], model(x[i : i + 1], sigma[i : i + 1], labels()[i : i + 1], b), atol=1e-5)


def test_the_network_is_told_its_budget_unless_it_is_ase(model):
    x, sigma = torch.randn(SHAPE), torch.tensor(1.0)
    told = model(x, sigma, labels(), 3)
    model.net.budget_embedding = False
    assert not torch.allclose(told, model(x, sigma, labels(), 3))


def test_the_budget_falls_as_the_noise_grows():
    cfg = dataclasses.replace(CFG, depth=28)           # ASE's published table, for its 28 blocks
    sigmas = presto.rho_schedule(1 - (torch.arange(10) + 0.5) / 10, cfg)
    assert presto.budget_at(sigmas, cfg.budgets, cfg).tolist() == [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]
    assert presto.budget_at(sigmas[9], cfg.budgets, cfg) == 12
    on_edges = presto.rho_schedule(torch.arange(1, 10) / 10, cfg)     # floats must not decide: the noisier bin does
    assert presto.budget_at(on_edges, cfg.budgets, cfg).tolist() == [12, 12, 16, 16, 20, 20, 24, 24, 28]


def test_the_self_teacher_pulls_the_short_pass_to_the_full_one_and_not_back(model):
    x, sigma = torch.randn(SHAPE), torch.full((6,), 5.0)
    full_only = model.net.blocks[2]                    # runs at full depth only: budget 2 runs blocks 0 and 3
    loss = presto.layer_loss(model, x, labels(), sigma, torch.full((6,), 2), CFG)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in full_only.parameters())
    torch.manual_seed(1)
    without = presto.layer_loss(model, x, labels(), sigma, torch.full((6,), 2), ASE)
    torch.manual_seed(1)
    noisy = presto.add_noise(x, sigma)
    gap = presto.dsm_loss(model(noisy, sigma, labels(), 2), model(noisy, sigma, labels()), sigma, CFG.sigma_data)
    torch.manual_seed(1)
    both = presto.layer_loss(model, x, labels(), sigma, torch.full((6,), 2), dataclasses.replace(CFG, self_teacher=3.0))
    assert gap > 1e-4 and both.item() == pytest.approx((without + 3 * gap).item(), rel=1e-4)


def test_label_dropout_uses_the_null_label_at_its_rate():
    dropped = presto.drop_labels(torch.zeros(20_000, dtype=torch.long), 0.1)
    assert set(dropped.tolist()) == {0, NULL_LABEL}
    assert (dropped == NULL_LABEL).float().mean() == pytest.approx(0.1, abs=0.01)


# ---- Presto-S -----------------------------------------------------------------------------------


def test_a_fake_score_equal_to_the_guided_real_score_gives_no_gradient(model):
    x, sigma = torch.randn(SHAPE), torch.rand(6) + 0.5
    score = presto.guided(model, 2.0)
    assert presto.dmd_gradient(x, sigma, labels(), score, score).abs().max() == 0
    assert presto.dmd_gradient(x, sigma, labels(), score, model).abs().max() > 1e-3


def test_autograd_delivers_exactly_the_dmd_gradient():
    x = torch.randn(SHAPE, requires_grad=True)
    gradient = torch.randn(SHAPE)
    presto.dmd_loss(x, gradient).backward()
    assert torch.allclose(x.grad * x.numel(), gradient, atol=1e-5)


def test_the_dmd_gradient_moves_the_generator_towards_the_real_score():
    real, fake = (lambda x, s, l: torch.full_like(x, 2.0)), (lambda x, s, l: torch.full_like(x, -1.0))
    x = torch.zeros(SHAPE)
    g = presto.dmd_gradient(x, torch.ones(6), labels(), real, fake)
    assert torch.allclose(g, torch.full_like(g, -1.5))  # (-1 - 2) / |0 - 2|: a step down it raises x towards 2
    scaled = presto.dmd_gradient(x * 1.0, torch.ones(6), labels(), lambda x, s, l: real(x, s, l) * torch.arange(1, 7.0)[:, None, None], fake)
    assert torch.allclose(scaled[:, 0, 0], (-1 - 2 * torch.arange(1, 7.0)) / (2 * torch.arange(1, 7.0)))   # per sample


def test_both_scores_read_the_same_renoised_output():
    seen = []
    score = lambda x, sigma, label: seen.append(x) or x
    x, sigma = torch.zeros(6, 40, 50), torch.tensor([0.1, 0.5, 1, 2, 5, 20])
    presto.dmd_gradient(x, sigma, labels(), score, score)
    assert torch.equal(*seen) and torch.allclose(seen[0].std((1, 2)), sigma, rtol=0.1)


def trainees():
    teacher, fake_score, generator = (awake(presto.Denoiser(CFG)) for _ in range(3))
    return teacher, fake_score, generator, awake(presto.Discriminator(CFG))


def snapshot(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def test_the_generators_update_leaves_both_scores_and_the_head_alone():
    teacher, fake_score, generator, head = trainees()
    before, mine = snapshot(teacher, fake_score, head), snapshot(generator)
    x = generator(torch.randn(SHAPE), torch.full((6,), 2.0), labels())
    loss = presto.generator_loss(x, labels(), presto.guided(teacher, 2.0), fake_score, head, CFG)
    presto.update(loss, torch.optim.Adam(generator.parameters()), 1e-3)
    others = [teacher, fake_score, head]
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(*others)))
    assert all(p.grad is None for m in others for p in m.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(mine, snapshot(generator)))


def test_the_fake_scores_update_leaves_the_generator_alone_and_moves_score_and_head():
    teacher, fake_score, generator, head = trainees()
    before, mine = snapshot(generator, teacher), snapshot(fake_score, head)
    with torch.no_grad():
        x = generator(torch.randn(SHAPE), torch.full((6,), 2.0), labels())
    loss = presto.fake_score_loss(x, torch.randn(SHAPE), labels(), fake_score, head, CFG)
    presto.update(loss, torch.optim.Adam([*fake_score.parameters(), *head.parameters()]), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(generator, teacher)))
    assert all(p.grad is None for p in generator.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(mine, snapshot(fake_score, head))]
    assert sum(moved) > 0.8 * len(moved)


def test_the_gan_losses_are_least_squares_with_their_own_weights(model, monkeypatch):
    head = lambda hidden: hidden[:, :4, 0] * 0 + torch.arange(len(hidden))[:, None]      # sample i is rated i
    x = torch.randn(3, *SHAPE[1:])
    cfg = dataclasses.replace(CFG, nu1=1.0, nu2=0.0)
    same = presto.generator_loss(x, labels(3), model, model, head, cfg)                  # no DMD gradient
    assert same.item() == pytest.approx((1 + 0 + 1) / 3)                                 # (0-1)^2, (1-1)^2, (2-1)^2
    monkeypatch.setattr(presto, "dsm_loss", lambda *_: torch.tensor(0.0))
    cfg = dataclasses.replace(CFG, nu1=0.0, nu2=1.0)
    loss = presto.fake_score_loss(x, x, labels(3), model, head, cfg)
    assert loss.item() == pytest.approx((0 + 1 + 4) / 3 + (4 + 9 + 16) / 3)              # made: 0, real: 1


def test_the_discriminator_rates_a_sequence_and_teaches_the_lower_half_of_the_fake_score(model):
    head = awake(presto.Discriminator(CFG))
    hidden = model(torch.randn(SHAPE), torch.rand(6) + 0.5, labels(), half=True)
    rating = head(hidden)
    assert hidden.shape == (6, CFG.frames, CFG.width) and rating.shape == (6, CFG.frames // 8)
    rating.square().mean().backward()
    touched = [any(p.grad is not None and p.grad.abs().max() > 0 for p in b.parameters()) for b in model.net.blocks]
    assert touched == [True] * (CFG.depth // 2) + [False] * (CFG.depth // 2)


def test_halfway_is_the_hidden_state_of_the_full_pass(model):
    x, sigma, seen = torch.randn(SHAPE), torch.rand(6) + 0.5, []
    handle = model.net.blocks[CFG.depth // 2 - 1].register_forward_hook(lambda m, i, out: seen.append(out))
    model(x, sigma, labels())
    handle.remove()
    assert torch.equal(model(x, sigma, labels(), half=True), seen[0])


def test_the_loss_uses_each_noise_distribution_where_the_paper_names_it(model, monkeypatch):
    asked = []
    draw = presto.draw_sigma
    monkeypatch.setattr(presto, "draw_sigma", lambda name, *rest: asked.append(name) or draw("train", *rest))
    cfg = dataclasses.replace(CFG, p_gen="GEN", p_dmd="DMD", p_dsm="DSM", p_gan="GAN")
    head, x = presto.Discriminator(CFG), torch.randn(SHAPE)
    presto.generator_loss(x, labels(), model, model, head, cfg)
    presto.fake_score_loss(x, x, labels(), model, head, cfg)
    assert asked == ["DMD", "GAN", "DSM", "GAN"]


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_students_call_the_generator_once_a_step_and_never_with_guidance(model, steps, monkeypatch):
    calls = []
    forward = presto.Denoiser.forward
    monkeypatch.setattr(presto.Denoiser, "forward", lambda self, x, sigma, label, budget=None, half=False:
                        calls.append((len(x), float(sigma), label.tolist(), budget)) or forward(self, x, sigma, label, budget, half))
    for name in ("presto-s", "presto-ls"):
        calls.clear()
        presto.generate(name, model, labels(3), steps, CFG)
        assert [c[0] for c in calls] == [3] * steps and all(NULL_LABEL not in c[2] for c in calls)
        assert [c[1] for c in calls] == pytest.approx(presto.student_sigmas(steps, CFG).tolist())
        if name == "presto-ls":
            assert calls[0][3] < CFG.depth             # most noise, fewest blocks


def test_multistep_sampling_renoises_to_exactly_the_next_sigma():
    seen = []
    denoise = lambda x, sigma, label: seen.append(x.std() / sigma) or torch.zeros_like(x)
    x = CFG.sigma_max * torch.randn(64, 4, 16)
    presto.sample_multistep(denoise, x, presto.student_sigmas(4, CFG), None)
    assert [float(s) for s in seen] == pytest.approx([1.0] * 4, rel=0.05)


def test_the_teacher_pays_two_guided_evaluations_a_step_but_one(model):
    calls = []
    counted = lambda x, sigma, label: calls.append(len(x)) or model(x, sigma, label)
    presto.sample_heun(presto.guided(counted, 2.0), torch.randn(SHAPE), presto.edm_sigmas(5, CFG), labels())
    assert calls == [12] * 9                           # 2 * 5 - 1 evaluations, each of both halves of CFG


# ---- training and the command line --------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run at tiny size, through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert presto.main(["train", "--preset", "tiny", "--out", str(folder), "--device", "cpu"]) == 0
    return folder


def test_latents_have_the_standard_deviation_sigma_data(trained):
    run = presto.Run.existing(trained, torch.device("cpu"))
    wave, _ = toy_data.make_batch(256)
    latents = run.load("vae").encode(wave)
    assert latents.shape == (256, CFG.latent_channels, CFG.frames)
    assert latents.std((0, 2)).tolist() == pytest.approx([CFG.sigma_data] * CFG.latent_channels, rel=0.1)


def test_five_fake_updates_for_each_generator_update(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    order = []
    update = presto.update
    monkeypatch.setattr(presto, "update", lambda loss, optimizer, lr: order.append(lr) or update(loss, optimizer, lr))
    loss = presto.fake_score_loss                      # to which x_gen is data: no graph back into the generator
    monkeypatch.setattr(presto, "fake_score_loss", lambda x, *rest: order.append("graph") if x.requires_grad else loss(x, *rest))
    presto.main(["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu", "--stage", "presto-ls"])
    assert order == ([CFG.fake_lr] * 5 + [CFG.generator_lr]) * CFG.student_steps


@pytest.mark.parametrize("full_scores", [True, False])
def test_the_generator_drops_layers_in_presto_ls_and_the_scores_only_if_asked(trained, tmp_path, monkeypatch, full_scores):
    shutil.copytree(trained, tmp_path / "run")
    budgets = {}
    forward = presto.Denoiser.forward
    monkeypatch.setattr(presto.Denoiser, "forward", lambda self, x, sigma, label, budget=None, half=False:
                        budgets.setdefault(id(self), []).append(budget is not None) or forward(self, x, sigma, label, budget, half))
    monkeypatch.setattr(presto.Run, "listens", lambda *_: False)
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu", "--stage", "presto-ls",
                        "--full_scores", str(full_scores)]) == 0
    assert all(len(set(b)) == 1 for b in budgets.values())           # a denoiser drops layers always, or never
    assert sorted(b[0] for b in budgets.values()) == [not full_scores, not full_scores, True]   # real, fake, generator


def test_presto_s_starts_from_the_teacher_and_presto_ls_from_presto_l(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu", "--stage", "presto-s",
                        "--generator_lr", "0"]) == 0    # a generator that cannot learn stays what it started from
    run = presto.Run.existing(tmp_path / "run", torch.device("cpu"))
    starts = [("presto-s", "teacher", run), ("presto-ls", "presto-l", run)]
    shutil.copytree(trained, tmp_path / "other")
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path / "other"), "--device", "cpu", "--stage", "presto-s",
                        "--generator_lr", "0", "--ls_start", "presto-s"]) == 0
    starts.append(("presto-ls", "presto-s", presto.Run.existing(tmp_path / "other", torch.device("cpu"))))
    for student, start, run in starts:
        started, ended = run.load(start).state_dict(), run.load(student).state_dict()
        assert all(torch.allclose(started[k], ended[k], atol=1e-7) for k in started)


def test_what_is_sampled_is_the_average_of_the_weights(trained, monkeypatch, tmp_path):
    run = presto.Run(tmp_path, CFG, 0, torch.device("cpu"))
    shown = []
    monkeypatch.setattr(presto, "averaged", lambda model, decay: shown.append(presto.AveragedModel(model)) or shown[-1])
    for stage in ("vae", "teacher", "presto-l"):
        (tmp_path / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())
    for stage in ("teacher", "presto-l", "presto-s", "presto-ls"):
        assert presto.TRAIN[stage](run, stage) is shown[-1].module


def test_sample_writes_playable_wavs_and_says_what_it_heard(trained, tmp_path, capsys):
    for model in ("teacher", "presto-l", "presto-s", "presto-ls"):
        status = presto.main(["sample", "--steps", "2", "--model", model, "--prompt", "a3 saw", "--count", "2",
                              "--run", str(trained), "--out", str(tmp_path / model), "--device", "cpu"])
        assert status == 0
        assert sorted(p.name for p in (tmp_path / model).glob("*.wav")) == ["A3-saw-000.wav", "A3-saw-001.wav"]
        wave, rate = soundfile.read(tmp_path / model / "A3-saw-000.wav")
        assert rate == toy_data.SAMPLE_RATE and len(wave) == toy_data.CLIP_SAMPLES and abs(wave).max() < 1
        assert soundfile.info(tmp_path / model / "A3-saw-000.wav").subtype == "PCM_16"
        out = capsys.readouterr().out
        assert "A3-saw-001.wav" in out and "of 2 right" in out and "times real time" in out


def test_the_same_seed_gives_the_same_bytes_and_a_longer_count_begins_alike(trained, tmp_path):
    for name, count, seed in (("a", 1, 5), ("b", 3, 5), ("c", 1, 6)):
        presto.main(["sample", "--prompt", "C4 organ", "--count", str(count), "--seed", str(seed), "--run", str(trained),
                     "--out", str(tmp_path / name), "--device", "cpu"])
    first = [(tmp_path / name / "C4-organ-000.wav").read_bytes() for name in "abc"]
    assert first[0] == first[1] != first[2]
    assert len({p.read_bytes() for p in (tmp_path / "b").glob("*.wav")}) == 3


def test_loud_samples_are_turned_down_and_never_clipped(trained, tmp_path, monkeypatch, capsys):
    decode = presto.VAE.decode
    monkeypatch.setattr(presto.VAE, "decode", lambda self, latents: 100 * decode(self, latents))
    presto.main(["sample", "--prompt", "C4 organ", "--run", str(trained), "--out", str(tmp_path), "--device", "cpu"])
    wave, _ = soundfile.read(tmp_path / "C4-organ-000.wav")
    assert "turned down" in capsys.readouterr().out and (abs(wave) > 0.999).sum() <= 2


# ---- the figures --------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_closed_form():
    a, b = torch.randn(20_000, 4, dtype=torch.float64), torch.randn(20_000, 4, dtype=torch.float64)
    assert toy_data.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert toy_data.frechet_distance(a + 3, b) == pytest.approx(4 * 9, rel=0.02)           # 4 means, 3 apart
    assert toy_data.frechet_distance(3 * a, b) == pytest.approx(4 * (3 - 1) ** 2, rel=0.03)   # 4 deviations, 3 and 1
    mix = torch.tensor([[1.0, 0.9, 0, 0], [0, 0.4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    other = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    A, B = mix.T @ mix, other.T @ other
    values = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    assert toy_data.frechet_distance(a @ mix, b @ other) == pytest.approx((A.trace() + B.trace() - 2 * values).item(), rel=0.1)


def test_mmd_is_unbiased_and_sees_a_shift():
    same = [toy_data.mmd(torch.randn(300, 8), torch.randn(300, 8)) for _ in range(20)]
    assert abs(sum(same) / 20) < 0.5 and min(same) < 0 < max(same)
    assert toy_data.mmd(torch.randn(300, 8) + 1, torch.randn(300, 8)) > 20


def test_density_recall_coverage_of_the_same_of_noise_and_of_a_collapse():
    real, same = torch.randn(500, 8), torch.randn(500, 8)
    density, coverage, recall = toy_data.density_recall_coverage(same, real)
    assert density == pytest.approx(1, abs=0.15) and coverage > 0.9 and recall > 0.9
    assert toy_data.density_recall_coverage(same + 20, real) == (0, 0, 0)
    few_modes = real[:100].repeat(5, 1)
    assert toy_data.density_recall_coverage(few_modes, real)[1] < toy_data.density_recall_coverage(same, real)[1] - 0.1


def test_a_collapsed_generator_is_all_right_and_yet_found_out():
    label = torch.full((200,), 3)
    reference = toy_data.embed(toy_data.make_batch(200, labels=label)[0])
    one = toy_data.make_batch(1, labels=label[:1])[0].repeat(200, 1)
    figures = toy_data.score(one, label, reference)
    assert figures["right"] == 1 and figures["recall"] < 0.05 and figures["coverage"] < 0.1
    real = toy_data.score(toy_data.make_batch(200, labels=label)[0], label, reference)
    assert real["recall"] > 0.9 and real["coverage"] > 0.9 and real["fd"] < figures["fd"] / 5
    louder = toy_data.score(2 * one, label, reference)
    assert louder["loudness"] - figures["loudness"] == pytest.approx(20 * math.log10(2), abs=1e-3)
    noise = toy_data.score(0.1 * torch.randn_like(one), label, reference)
    assert noise["right"] == 0 and noise["coverage"] == 0 and noise["fd"] > 10 * real["fd"]


def test_the_cost_of_each_sampler_is_what_it_calls():
    assert presto.cost("teacher", 16, CFG) == (31, CFG.depth)
    assert presto.cost("presto-s", 4, CFG) == (4, CFG.depth)
    evaluations, blocks = presto.cost("presto-ls", 4, CFG)
    assert evaluations == 4 and blocks < CFG.depth


def test_eval_writes_a_table_and_one_page_that_needs_nothing_else(trained, capsys):
    assert presto.main(["eval", "--run", str(trained), "--count", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    saved = json.loads((trained / "eval.json").read_text())["rows"]
    assert "presto-ls, 4 steps" in out and saved["presto-ls, 4 steps"]["passes"] == 4
    text = (trained / "report.html").read_text()
    assert text.count("<audio controls aria-label=") == text.count("<canvas role='img' aria-label=") > 20
    assert all(line in out for line in ("teacher with 4 of 4 blocks: ", "presto-l with 2 of 4 blocks: "))
    assert presto.main(["eval", "--run", str(trained), "--count", "2", "--device", "cpu", "--model", "presto-s"]) == 0
    part = json.loads((trained / "eval-presto-s.json").read_text())["rows"]
    assert [t for t in saved if "presto-s" in t] == list(part)[2:] and json.loads((trained / "eval.json").read_text())["rows"] == saved
    assert "http" not in text and "<th scope='row'>presto-s, 16 steps</th>" in text


def test_presto_l_without_its_three_changes_is_called_ase(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path / "run"), "--device", "cpu", "--stage", "presto-l",
                        "--until", "presto-l", "--shift", "false", "--budget_embedding", "false", "--self_teacher", "0"]) == 0
    assert presto.main(["eval", "--run", str(tmp_path / "run"), "--count", "2", "--device", "cpu", "--model", "presto-l"]) == 0
    assert "\nase, 4 steps, w = 1.25" in capsys.readouterr().out


# ---- faults and bad input -----------------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(size):
    """The operating system refuses to write more into any file: what a full disk feels like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_gets_one_line_and_leaves_no_half_of_a_file(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "presto-ls.pt").unlink()
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with files_no_larger_than(10_000):
        for command in (["sample", "--model", "presto-s", "--run", str(trained), "--out", str(tmp_path / "out")],
                        ["train", "--preset", "tiny", "--out", str(tmp_path / "run")]):
            assert presto.main([*command, "--device", "cpu"]) == 2
            assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == [] and sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def weights(folder):
    return {p.name: torch.load(p, weights_only=True)["parts"]["model"] for p in sorted(folder.glob("*.pt"))}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and "presto-ls.pt" in a
    return all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


def stopped(folder, number, seconds, *more):
    """Train as a process of its own, send it a signal that long after it began; its exit status and stderr."""
    command = [sys.executable, presto.__file__, "train", "--preset", "tiny", "--out", str(folder), "--device", "cpu", "--save_every", "0", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()                          # "Training Presto! ...": from now on, any moment will do
    if number:
        time.sleep(seconds)
        process.send_signal(number)
    return process.communicate()[1], process.returncode


def test_the_same_seed_trains_the_same_weights_and_an_interrupted_run_ends_alike(trained, tmp_path):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)):
        err, returned = stopped(tmp_path, number, 0.05)     # soon: a fast machine must not be done before
        assert returned == status
        assert returned < 130 or f"{signal.Signals(number).name}: stopped and saved" in err
    assert same_weights(trained, tmp_path)


@slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    """SIGKILL, which no program can catch: whatever is then in the folder is whole, and the end is the same."""
    more = ["--vae_steps", "60", "--teacher_steps", "60", "--layer_steps", "60", "--student_steps", "30"]
    assert stopped(tmp_path / "whole", None, 0, *more)[1] == 0
    moments, kills, status = random.Random(0), 0, None
    while status != 0:
        number = signal.SIGKILL if kills < 24 else None
        _, status = stopped(tmp_path / "killed", number, moments.uniform(0.0, 1.0), *more)
        kills += status == -signal.SIGKILL
        for file in (tmp_path / "killed").glob("*.pt"):
            torch.load(file, weights_only=True)
    assert kills >= 20
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


@slow
def test_compiled_networks_train_to_nearly_the_same_weights(trained, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(presto.Denoiser, "compile", lambda self: compiled.append(self) or torch.nn.Module.compile(self))
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--compile"]) == 0
    assert len(compiled) == 1 + 1 + 3 + 3              # teacher, Presto-L, and three networks in each student's stage
    a, b = weights(trained), weights(tmp_path)
    assert all(torch.allclose(a[f][k], b[f][k], atol=1e-2) for f in a for k in a[f])


def test_a_stopped_stage_goes_on_bit_for_bit(trained, tmp_path):
    for stage in presto.STAGES:                        # stopped after its first step
        folder = tmp_path / stage
        shutil.copytree(trained, folder)
        for file in [*folder.glob("*.partial.pt"), folder / f"{stage}.pt"]:
            file.unlink(missing_ok=True)
        run = presto.Run(folder, CFG, 0, torch.device("cpu"), save_every=-1)   # saves before every step
        run.listens = lambda step, total: setattr(run, "stop", signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run.train(stage)
        presto.Run(folder, CFG, 0, torch.device("cpu")).train(stage)
    assert all(same_weights(trained, tmp_path / stage) for stage in presto.STAGES)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "one bit flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif how == "another program's":
        torch.save({"epoch": 3}, path)
    elif how == "a crafted pickle":
        torch.save(Bomb(), path)
    elif how == "of another config":
        saved = torch.load(path, weights_only=True)
        saved["config"]["nu1"] = 0.5
        torch.save(saved, path)
    elif how == "a missing key":
        saved = torch.load(path, weights_only=True)
        del saved["parts"]["model"]["net.position"]
        torch.save(saved, path)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "one bit flipped", "another program's", "a crafted pickle",
                                 "a missing key", "of another config"])
def test_a_spoilt_checkpoint_gets_one_line_that_names_it(trained, tmp_path, capsys, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run" / "presto-ls.pt", how)
    assert presto.main(["sample", "--run", "run", "--out", "out", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "presto-ls.pt" in err and "train" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "bomb-went-off").exists()


S, T = ["sample", "--run", "RUN", "--out", "OUT"], ["train", "--preset", "tiny", "--out", "OUT"]
BAD = [
    *[(S + ["--prompt", p], "unknown prompt") for p in ("H3 saw", "A3 piano", "saw A3", "", "../../etc", "音 saw", "x" * 10_000, "A3")],
    (S + ["--prompt", "A3 sow"], "did you mean A3 saw"), (S + ["--prompt", "saw A3"], "did you mean A3 saw"),
    *[(S + ["--steps", x], f"'{x}'") for x in ("0", "-1", "1.5", "1000000000", "abc", "", "nan")],
    *[(S + ["--count", x], f"'{x}'") for x in ("0", "-3", "1e9", "many")],
    *[(S + ["--seed", x], f"'{x}'") for x in ("-1", "x", "99999999999")],
    (S + ["--model", "presto"], "presto-ls"), (S + ["--device", "tpu"], "cpu"), (S + ["--step", "4"], "did you mean --steps"),
    (S + ["--model", "presto-s2"], "presto-s"), (S + ["--model", "vae"], "presto-s"), (S + ["extra"], "extra"), (S[:1] + ["--run", "nowhere"], "nowhere"),
    (["sample", "--run", "RUN", "--out", "FILE"], "FILE"), (["paint"], "train"), (["train", "--out", "FILE"], "FILE"),
    (T + ["--stage", "presto-s", "--until", "vae"], "before"), (T + ["--preset", "huge"], "tiny"), (T + ["--full_scores", "1"], "true or false"), (T + ["--stage", "presto"], "presto-ls"), (T + ["--seed", "abc"], "abc"),
    (T + ["--device", "tpu"], "cpu"), (T + ["--width", "18"], "18"), (T + ["--heads", "3"], "of --heads 3"),
    (T + ["--depth", "0"], "0"), (T + ["--depth", "1"], "from 2"), (T + ["--teacher_step", "4"], "did you mean --teacher_steps"), (T + ["--budgets", "1,2"], "to 1"),
    (T + ["--budgets", "a,b"], "commas"), (T + ["--budgets", ""], "commas"), (T + ["--stride", "500"], "8192"),
    (T + ["--stride", "4096"], "8 frames"), (T + ["--sigma_min", "90"], "sigma_max"), (T + ["--sigma_data", "0"], "from 0.001"),
    (T + ["--rho", "nan"], "nan"), (T + ["--vae_lr", "inf"], "inf"), (T + ["--teacher_steps", "0"], "0"),
    (T + ["--teacher_steps", "2.5"], "2.5"), (T + ["--shift", "maybe"], "true or false"), (T + ["--p_gen", "five"], "four"),
    (T + ["--p_dmd", "four"], "'train', 'inf'"), (T + ["--label_dropout", "1"], "to 0.99"), (T + ["--teacher_ema", "1"], "to 0.99999"),
    (T + ["--nu1", "-1"], "from 0"), (T + ["--save_every", "-1"], "-1"),
    (["train", "--preset", "tiny", "--depth", "6", "--out", "RUN"], "depth (4 there, 6 here)"),
    (["train", "--preset", "tiny", "--seed", "3", "--out", "RUN"], "seed (0 there, 3 here)"),
    (["eval", "--run", "nowhere"], "nowhere"), (["eval", "--run", "RUN", "--count", "1"], "'1'"),
]


@pytest.mark.parametrize("arguments, says", BAD, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "")
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(trained, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    before = sorted(p.name for p in trained.iterdir())
    status = presto.main([str(trained) if a == "RUN" else a for a in arguments])
    out, err = capsys.readouterr()
    assert status == 2 and err.count("\n") == 1 and err.startswith("presto.py: ") and says in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"] and sorted(p.name for p in trained.iterdir()) == before


def test_a_loss_that_is_no_number_stops_training_and_says_where(tmp_path, capsys):
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--vae_lr", "1e7"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "vae, step" in err and "learning rate" in err and not (tmp_path / "vae.pt").exists()


def test_until_stops_there_and_says_how_to_go_on(trained, tmp_path, capsys):
    for until, there in (("vae", 1), ("presto-l", 3)):
        assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--until", until]) == 0
        assert len(list(tmp_path.glob("*.pt"))) == there and "train --out" in capsys.readouterr().out
    assert presto.main(["train", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert same_weights(trained, tmp_path)


def test_help_teaches(capsys):
    assert presto.main([]) == 0 and "sample --steps 4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        presto.main(["train", "-h"])
    assert "fake-score updates per generator update" in capsys.readouterr().out
