"""Every metric key that flowray writes: what it measures, in which unit, which way is better, what
is normal and who says so.

Names may hold alternatives `{a,b}` and `{0..9}` or a free part `<score>`; `describe` resolves
concrete names, and `ema/KEY` to KEY measured on the EMA weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

INF = math.inf
# vae/psnr in dB: what the logs' autoencoder reads, which is in order; and below which it spoils a
# run, whatever else is right
GOOD_PSNR, POOR_PSNR = 29.0, 24.0
Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class MetricKey:
    """One metric. good: the (low, high) a healthy run stays in, infinite where a side is open;
    None where nothing is claimed.
    """

    name: str
    unit: str
    direction: Direction
    good: tuple[float, float] | None
    formula: str
    source: str


LOSSES = "log, training losses"
PIPELINE = "log, pipeline check"
LOG_0919 = "log 0919"
LOG_0901 = "log 0901"
CROSSFLOW = "CrossFlow"
FLOWRAY = "flowray"


def _key(
    name: str,
    unit: str,
    direction: Direction,
    formula: str,
    source: str = FLOWRAY,
    good: tuple[float, float] | None = None,
) -> MetricKey:
    return MetricKey(name, unit, direction, good, formula, source)


GROUP = "{text,z_head,trunk,trunk_plain,flow_head}"  # of the optimiser
LOSS = "{flow,kl,clip,dino,repa,lpips,tv,norm,anchor}"  # of a key that every loss has
# what flowray/doctor/parts.py asks whether it takes part
PART = (
    "{queries,connector,head,mu,tower,student,projector,patches,time,null,caption,gates,blocks,"
    "output}"
)

# fmt: off
KEYS: tuple[MetricKey, ...] = (
    # the objective, unweighted
    _key("loss/flow", "latent^2 per dim", "lower", "mean |u(x_t, t) - v*|^2", CROSSFLOW),
    _key("loss/kl", "nats per dim (gaussian form)", "none",
         "KL(N(mu, sigma^2) || N(0, I)) / D on unscaled mu, logvar", LOSSES),
    _key("loss/kl_raw", "nats (gaussian form)", "none", "loss/kl * D, the sum over latent dims",
         LOG_0901),
    _key("loss/clip", "nats", "lower", "symmetric InfoNCE of z0 and the tower's view of z1",
         CROSSFLOW),
    _key("loss/dino", "nats", "lower",
         "cross-entropy of the student with the teacher's soft targets", LOSSES),
    _key("loss/repa", "-cosine", "lower",
         "-mean cosine of projected hidden tokens and a frozen encoder's patches", "REPA",
         (-1.0, 0.0)),
    _key("loss/lpips", "distance", "lower",
         "perceptual distance of decoded x1 estimate and picture", LOG_0901),
    _key("loss/tv", "latent per step", "lower",
         "mean |difference of neighbouring latent cells| of z0", LOG_0901),
    _key("loss/norm", "latent^2", "lower", "mean (||v|| - ||v*||)^2", LOG_0919),
    _key("loss/anchor", "latent^2", "lower",
         "mean (mu - z1)^2; at best what the caption leaves open of z1", "arXiv 2106.06406"),
    _key("loss/total", "-", "lower",
         "sum of weight/<loss> * balance/<loss> * loss/<loss>, whose gradient is the step's"),
    _key(f"weight/{LOSS}", "-", "none", "the loss's weight at this step, after its schedule"),
    # optimisation
    _key("lr/<group>", "-", "none", "learning rate of the parameter group", LOG_0901),
    _key("amp/scale", "-", "none", "loss scale of mixed precision", LOG_0901),
    _key("amp/backoffs", "count", "lower", "times the loss scale was cut so far", LOG_0901),
    _key("grad/clip_frac", "share", "none",
         "share of the steps since the last logged row clipped to optim.clip_grad",
         LOG_0901),
    _key("grad/skipped", "count", "lower",
         "steps so far that did not reach the weights: a loss or the gradient was not finite"),
    _key("grad/total", "norm", "none", "norm of the gradient of the weighted sum, before clipping",
         LOSSES),
    _key(f"grad/{LOSS}", "norm", "none",
         "norm of the gradient of this loss alone, unweighted", LOSSES),
    _key(f"grad/{LOSS}_weighted", "norm", "none",
         "grad/<loss> * weight/<loss> * balance/<loss>", LOSSES),
    _key(f"grad/cos_{LOSS}_{LOSS}", "cosine", "none",
         "cosine of the gradients of two losses; below 0 they conflict", LOSSES),
    _key(f"balance/{LOSS}", "-", "none",
         "what gradient balancing multiplies weight/<loss> by; for pcgrad, of this step alone",
         LOSSES),
    _key("step/{z_head,flow_head}_update_ratio", "-", "none",
         "mean of ||update|| / ||parameter|| per tensor", LOSSES, (1e-5, INF)),
    _key("ent/{teacher,student}", "nats", "none",
         "entropy of the softened outputs; near 0: too sharp to teach", LOSSES),
    # the source posterior
    _key("mu/abs_mean", "latent", "none", "mean |mu|; falls where the KL acts", LOSSES),
    _key("mu/rms", "latent", "none", "root mean mu^2; near 0: the text does not reach the latent",
         LOSSES),
    _key("logvar/mean", "nats", "none", "mean log sigma^2; tends to 0 where the KL acts", LOSSES,
         (-6.0, 6.0)),
    _key("std/mean", "latent", "none",
         "mean sigma; tends to 1 where the KL acts, near 0 is a collapsed source", LOSSES,
         (0.3, 3.0)),
    _key("std/{min,max}", "latent", "none", "least or greatest sigma of the batch", LOSSES),
    _key("source/separation@{0,0.25,0.5}", "share", "higher",
         "share of x_t at this t whose most likely caption is their own; chance 1 / captions"),
    _key("source/width", "-", "none", "mean sigma^2 / variance per dim of z1 within a caption"),
    _key("source/width_all", "-", "none",
         "mean sigma^2 / variance per dim of z1: fewer than 16 pairs share a caption"),
    _key("z_init/mean", "latent", "none", "mean of the sampled z0, about 0", LOSSES),
    _key("z_init/var", "latent^2", "none", "variance of the sampled z0, about 1", LOSSES),
    _key("z_init/std_per_dim_mean", "latent", "none",
         "std over the batch, averaged over latent dims", LOSSES),
    _key("scale/{z0,z1,xt,v}_norm", "latent", "none", "batch mean of ||.|| over all latent dims",
         PIPELINE),
    _key("scale/ratio", "-", "none", "||z1|| / ||z0||; far from 1: check the autoencoder interface",
         PIPELINE, (1 / 3, 3.0)),
    # the velocity field on the fixed held-out batch
    _key("flow/cos", "cosine", "higher", "mean over samples of cos(u, v*)", LOG_0919, (0.5, 1.0)),
    _key("flow/nmse", "-", "lower", "mean |u - v*|^2 / mean |v*|^2; predicting 0 gives 1", LOSSES,
         (0.0, 1.0)),
    _key("flow/speed_ratio", "-", "none", "mean over samples of ||u|| / ||v*||", LOG_0919,
         (0.5, 2.0)),
    _key("flow/cond_gain_cos", "cosine", "higher",
         "cos with own z0 minus cos with another caption's z0, same z1", LOSSES, (0.0, 2.0)),
    _key("flow/nmse_t{0..9}", "-", "lower", "flow/nmse of the samples with t in this tenth", LOSSES,
         (0.0, 1.0)),
    _key("flow/cos_t{0..9}", "cosine", "higher", "flow/cos of the samples with t in this tenth",
         LOSSES, (0.5, 1.0)),
    _key("flow/endpt_rmse@{8,16,32,64}", "latent", "lower",
         "root mean (z_end - z1)^2 after K Euler steps; falls with K", LOSSES),
    # the whole path from a sampled z0
    _key("shoot/mse", "latent^2", "lower",
         "mean (z_end - z1)^2 after 100 Euler steps from a sampled z0", LOG_0919),
    _key("shoot/nmse", "-", "lower", "shoot/mse / data/var; the data's mean latent gives 1",
         FLOWRAY, (0.0, 1.0)),
    _key("shoot/skill", "-", "higher", "1 - shoot/mse / mean (z0 - z1)^2; standing still gives 0",
         FLOWRAY, (0.0, 1.0)),
    _key("shoot/cond_gain", "-", "higher", "(mse with captions swapped - mse) / data/var", FLOWRAY,
         (0.0, INF)),
    _key("shoot/energy", "-", "lower",
         "E|z_end - z1| - E|z_end - z_end'| / 2 over the same of the data; 1: any picture",
         "Gneiting and Raftery 2007", (0.0, 1.0)),
    _key("shoot/diversity", "-", "none",
         "E|z_end - z_end'| / E|z1 - z1'|, both within a caption; 0: one picture, 1: as the data"),
    _key("shoot/diversity_all", "-", "none",
         "the same over E|z1 - z1'| of any two pictures: fewer than 16 pairs share a caption"),
    _key("shoot/copies", "share", "lower",
         "share of z_end nearer to a training latent than 1 % of held-out ones; 0.01: as new ones",
         "Carlini et al. 2023", (0.0, 0.2)),
    _key("data/var", "latent^2", "none",
         "variance of z1, held-out set, about its mean at each channel and place; rows without it"
         " are older and have shoot/nmse over the variance about one mean"),
    _key("data/left_open", "share", "none",
         "variance per dim of z1 within a caption / of the data; 0: the caption says everything"),
    _key("teacher/mse@{5,10,20,50,100}", "latent^2", "lower",
         "mean (z_end - psi(1))^2, true field, N fp32 steps", LOG_0919, (0.0, 1e-09)),
    _key("teacher_native/mse@{5,10,20,50,100}", "latent^2", "lower",
         "teacher/mse in the sampler's own dtype; bf16 grows with N", LOG_0919),
    _key("gain/best", "-", "none", "the factor on u that fits v* best (least squares)", LOG_0919,
         (0.5, 2.0)),
    # text, autoencoder, time code
    _key("text/cos", "cosine", "lower",
         "mean cosine of sampled z0 over pairs of prompts; low with mu near 0 is noise", LOG_0919,
         (-1.0, 0.9)),
    _key("text/cos_mu", "cosine", "lower", "mean cosine of mu over pairs of prompts", FLOWRAY,
         (-1.0, 0.9)),
    _key("text/cos_same", "cosine", "none", "cosine of two z0 of one prompt; the noise's share"),
    _key("text/cut", "share", "lower",
         "training captions of a sample of the set that are cut at model.text.max_tokens"),
    _key("text/snr", "-", "higher", "Var over prompts of mu / mean sigma^2"),
    _key("vae/psnr", "dB", "higher",
         "10 log10(1 / mean (decode(encode(x)) - x)^2), pixels in [0, 1]", LOG_0919,
         (GOOD_PSNR, INF)),
    _key("latent/channel_mean_max", "latent", "lower",
         "greatest |mean| of a channel of z1, held-out set", LOG_0901, (0.0, 1.0)),
    _key("latent/channel_std_{min,max}", "latent", "none",
         "least or greatest std of a channel of z1, held-out set", LOG_0901, (0.5, 2.0)),
    _key("time/embed_norm", "norm", "none", "norm of the time embedding; too large drowns the rest",
         PIPELINE),
    _key("ema/delta_rms", "-", "none", "root mean square of EMA minus raw weights"),
    # what the doctor adds (flowray/doctor/battery.py); of the weights that are sampled, unless it
    # says raw or training
    _key(f"share/{LOSS}", "-", "none",
         "grad/<loss>_weighted / grad/flow_weighted; dino 0.2-0.5, kl 0.1-0.3", LOSSES),
    _key(f"grad/{LOSS}_of_total", "share", "none",
         "grad/<loss>_weighted / grad/total; dino below 0.05-0.1 or flow below 0.1 is weak",
         LOSSES),
    _key(f"grad/{LOSS}_head", "norm", "none",
         "norm of the weighted gradient of this loss on the text side and the head alone"),
    _key("step/{z_head,flow_head}_update_ratio_peak", "-", "none",
         "the update ratio at the highest rate so far, whatever the schedule has left", FLOWRAY,
         (1e-5, INF)),
    # the optimiser's arithmetic by group (flowray/doctor/optimiser.py). size: the root mean square
    # of its matrices at the start, at least that of a layer's usual start
    _key(f"optim/direction/{GROUP}", "-", "none",
         "rms of m / (sqrt(v) + eps) of AdamW's moments: step / rate; 1 all alike, 0.2 noise"),
    _key(f"optim/step/{GROUP}", "-", "none", "optim/direction * lr / size, at the present rate"),
    _key(f"optim/step_highest/{GROUP}", "-", "none",
         "optim/direction * lr / size, at the highest rate so far"),
    _key(f"optim/rate/{GROUP}", "-", "none", "highest rate so far * optim/eps / size"),
    _key(f"optim/reach/{GROUP}", "-", "none",
         "sum of the recipe's rates over the whole run * optim/eps / size; the farthest it can go"),
    _key(f"optim/scale/{GROUP}", "-", "none", "the group's rate / optim.lr at the peak"),
    _key("optim/pace", "-", "none", "peak rate / size, of the velocity network's faster group"),
    _key("optim/reach_peak", "-", "none", "optim/pace * train.steps"),
    _key(f"optim/eps/{GROUP}", "share", "higher",
         "rms of m / (sqrt(v) + eps) over that of m / sqrt(v): what eps leaves of the step"),
    _key(f"optim/eps_unclipped/{GROUP}", "share", "higher",
         "optim/eps with both moments as they were without clipping"),
    _key("optim/eps_value", "-", "none", "eps of the optimiser that training builds"),
    _key(f"optim/decay/{GROUP}", "share", "lower",
         "decay / (decay + gradient's step), by their rms", FLOWRAY, (0.0, 0.15)),
    _key(f"optim/snr/{GROUP}", "share", "none",
         "|m|^2 / |v|_1 of the moments: 0.05 is noise alone (beta1 0.9), 1 always the same"),
    _key(f"optim/still/{GROUP}", "share", "none", "numbers whose second moment is 0"),
    _key(f"optim/gradient/{GROUP}", "-", "none",
         "norm of the gradient now, clipped / root of the summed second moment"),
    _key("optim/gradient_logged", "-", "none", "median grad/total of late / the one measured now"),
    _key(f"optim/count/{GROUP}", "-", "none", "steps that the optimiser counts / the run's",
         FLOWRAY, (0.99, 1.01)),
    _key(f"optim/left_out/{GROUP}", "share", "lower",
         "numbers that the optimiser never stepped though they have a gradient"),
    _key(f"optim/moved/{GROUP}", "-", "none", "rms of weights - initial / size"),
    _key(f"optim/travel_walk/{GROUP}", "-", "none",
         "rms of weights - initial / root of the summed squares of the logged rates"),
    _key(f"optim/travel_straight/{GROUP}", "-", "none",
         "rms of weights - initial / sum of the logged rates; at most about 1"),
    _key("optim/clip/share", "share", "none", "mean of grad/clip_frac"),
    _key("optim/clip/kept", "share", "none", "optim.clip_grad / median grad/total of late"),
    _key("optim/memory", "-", "lower", "1 / (1 - beta1) / train.steps"),
    _key("optim/betas", "-", "lower", "beta1^2 - beta2"),
    _key("optim/schedule/{planned,highest_planned}", "share", "none",
         "mean and highest of the recipe's rates over the whole run / optim.lr"),
    _key("optim/schedule/{used,highest}", "share", "none",
         "mean and highest of the logged rates so far / optim.lr"),
    _key("optim/schedule/warmup", "share", "none",
         "mean of the recipe's rates / the same without warm-up"),
    _key("optim/schedule/idle", "share", "lower",
         "logged rows, back from the last, at less than 1 % of the highest rate"),
    _key("optim/schedule/agrees", "-", "none",
         "sum of the last logged rates / of the recipe's at these steps", FLOWRAY, (0.9, 1.1)),
    _key(f"optim/replay/{{error,size}}/{GROUP}", "-", "none",
         "||step - AdamW's||, ||step|| / ||AdamW's|| of one training step made on a copy"),
    _key("optim/replay/{gradient,gradient_cos}", "-", "none",
         "size and cosine of that step's gradient beside the losses' own"),
    _key("optim/replay/count", "count", "none", "steps that the optimiser counts in it"),
    _key("optim/replay/ema", "-", "none", "the EMA's way in it / what its decay asks"),
    _key("moved/{head,text,velocity,flow_head}", "-", "none",
         "||weights - initial|| / ||initial||; 0 where it never trained"),
    _key(f"part/{PART}/grad", "-", "none",
         "rms gradient of the part's own loss, over the part with the most (mu: over logvar's where"
         " that is more); 0: cut off"),
    _key(f"part/{PART}/moved", "-", "none",
         "rms change of its weights since step 0, decay aside, over the part with the most"),
    _key(f"part/{PART}/matters", "share", "none",
         "change of the training batch's velocity where the part's weights are 0, over its norm"),
    _key("input/{x,time,null,caption,noise,position}/matters", "share", "none",
         "change of that velocity with another sample's input (position: of patches moved)"),
    _key("input/patches/heard", "share", "none",
         "patches whose change the velocity of others notices, over a hundredth of the loudest's"),
    _key("input/noise/std", "-", "none", "std of (z0 - mean) / sigma as trained"),
    _key("input/noise/{rows,steps}", "-", "none",
         "1 - cosine of that noise between samples, and between two steps"),
    _key("input/time/{rows,steps}", "-", "none",
         "spread of t in a batch, and difference between two steps, over what flow.time has"),
    _key("input/time/off", "-", "lower", "sqrt(n) times Kolmogorov's distance of t from flow.time"),
    _key("input/null/share", "share", "none", "null samples, as the velocity network is told"),
    _key("input/null/off", "standard errors", "lower",
         "distance of that share from flow.null_probability"),
    _key("ema/moved", "-", "none", "||EMA - initial|| / ||raw - initial||; 0: never updated",
         FLOWRAY, (0.05, 2.0)),
    _key("ema/delta_relative", "-", "none", "||EMA - raw|| / ||raw||"),
    _key("field/fit_{x1,x0}", "-", "none",
         "a, b of least squares u ~ a z1 + b z0; v* has 1, -1; flipped -1, 1; x1 as target 1, 0"),
    _key("field/fit_share", "share", "higher", "share of u^2 that this fit explains"),
    _key("field/cos_{x1,x0,eps}", "cosine", "none",
         "mean cosine of u with z1, z0, the source noise"),
    _key("field/std", "latent per t", "none", "root mean u^2"),
    _key("same_batch/{train,eval}_loss", "latent^2", "lower",
         "mean |u - v*|^2 of one training batch, as trained and as probed, raw weights"),
    _key("same_batch/{train,eval}_nmse", "-", "lower",
         "same_batch/{train,eval}_loss / mean |v*|^2"),
    _key("same_batch/ratio", "-", "none",
         "eval over train loss of the same batch; 1 where both mean the same", FLOWRAY,
         (0.8, 1.25)),
    _key("seam/{captions,tokens,null}", "share", "lower",
         "share that training and sampling have otherwise, of the same batch"),
    _key("seam/{text,mu,std,z0,start,time_code,velocity,guidance}", "-", "lower",
         "|training's - sampling's| / |training's|, of the same captions, noise, x and t"),
    _key("seam/draws_{trained,sampled}", "-", "lower",
         "|std of z0 over draws / sigma - 1|, or how alike the noise of captions is"),
    _key("seam/latents", "-", "lower",
         "root of |mean (z1 of a training batch - cached mean)^2 - that of its width| / z1^2"),
    _key("seam/target", "-", "lower", "|v* - (x at t = 1 - x at t = 0)| / |v*| in training"),
    _key("seam/steps", "-", "lower",
         "|end of the sampler, led by that difference - training's x at t = 1| / |x|"),
    _key("seam/loss", "-", "lower", "|loss/flow - mean |u - v*|^2| / loss/flow of one batch"),
    _key("seam/pixels", "-", "lower",
         "rms(the sampler's pictures - decode(z1)) / std of the pixels"),
    _key("clip/cond_gain", "nats", "higher",
         "loss/clip with captions deranged minus with their own", LOSSES, (0.0, INF)),
    _key("clip/chance", "nats", "none", "ln(batch), what loss/clip is where nothing is told apart"),
    _key("clip/scale", "-", "none", "logit scale of the contrastive loss"),
    _key("dino/cond_gain", "nats", "higher",
         "loss/dino with captions deranged minus with their own", LOSSES, (0.0, INF)),
    _key("ent/chance", "nats", "none", "ln(prototypes), the entropy of a uniform output"),
    _key("guidance/null_cos", "cosine", "higher", "cos(u of null samples, v*) at mid path"),
    _key("guidance/gap", "-", "none", "||u - u_null|| / ||u|| at mid path"),
    _key("flow/endpt_rmse_heun@{8,16,32,64}", "latent", "lower",
         "flow/endpt_rmse@K with Heun's steps"),
    _key("endpoint/falls_{euler,heun}", "-", "lower",
         "endpoint RMSE at 64 steps / at 8; above 1 training and integration disagree", LOSSES,
         (0.0, 1.05)),
    _key("shoot/nmse_dt{1,2,3}", "-", "lower",
         "shoot/nmse in 25 Euler steps, each 1, 2 or 3 times as long", LOG_0919),
    _key("shoot/nmse_reversed", "-", "none", "shoot/nmse in 25 steps with the network told 1 - t",
         LOG_0919),
    _key("time/cos_{reversed,plain,log_snr}", "cosine", "none",
         "flow/cos with 8t - 4, t or the path's log-SNR in place of the time code"),
    _key("foreign/nmse_{told,reversed,thousand,thousandth,thousand_reversed,code}", "-",
         "none", "flow/nmse of a model trained elsewhere, told t, 1 - t, 1000 t, t / 1000,"
         " 1000 (1 - t), 4 - 8 t"),
    _key("time/share_t{0..9}", "share", "none",
         "share of the training times so far in this tenth; uniform 0.1"),
    _key("time/coverage_min", "-", "higher",
         "10 times the least time/share_t; 0: a part of [0, 1] is untrained", LOSSES, (0.05, 1.0)),
    _key("time/embed_ratio", "-", "none",
         "time/embed_norm / norm of an embedded token of white noise", PIPELINE),
    _key("sampler/nmse", "-", "lower",
         "mean (z_end - z1)^2 / Var(z1) of the sampler itself, as the recipe samples", FLOWRAY,
         (0.0, 1.0)),
    _key("sampler/nmse_plain", "-", "lower",
         "sampler/nmse of the probes' own integration without guidance", FLOWRAY, (0.0, 1.0)),
    _key("sampler/coarse", "-", "lower",
         "mean (sampler's z_end - that of twice the steps)^2 / Var(z1)"),
    _key("seam/weights", "-", "lower",
         "|weights that sampling opens - the checkpoint's| / |the checkpoint's|, the worst tensor"),
    _key("sampler/gap", "-", "lower", "mean (sampler's z_end - own integration's)^2 / Var(z1)",
         FLOWRAY, (0.0, 0.001)),
    _key("sampler/psnr", "dB", "higher",
         "pictures of the sampler against own integration and decoding; 99 is equal", FLOWRAY,
         (40.0, INF)),
    _key("sampler/strip_psnr_{ema,raw}", "dB", "none",
         "the strip that training wrote against pictures of these weights; 99 is equal"),
    _key("sampler/bits", "bits", "higher",
         "significand of the solver's state: 24 is fp32, 8 is bf16", LOG_0919, (24.0, INF)),
    _key("trace/{init,end}_std", "latent", "none", "std of z_init, of z_end", LOG_0919),
    _key("trace/first_dz_rms", "latent", "none", "root mean square of the first step's dz",
         LOG_0919),
    _key("trace/{init,end,real}_pixel_std", "pixels in [0, 1]", "none",
         "contrast of decode(z_init), decode(z_end), of real pictures", LOG_0919),
    _key("latent/mean", "latent", "none", "mean of z1, training set"),
    _key("latent/var", "latent^2", "none", "variance of z1 about one mean, training set; about 1",
         PIPELINE, (0.1, 9.0)),
    _key("latent/fit_slope", "-", "none",
         "least-squares slope of cached on freshly encoded z1",
         PIPELINE, (0.9, 1.1)),
    _key("latent/fit_residual", "share", "lower",
         "what that fit leaves; another autoencoder or other pictures", FLOWRAY, (0.0, 0.05)),
    _key("latent/fit_slope_train", "-", "none", "latent/fit_slope on training pictures", FLOWRAY,
         (0.9, 1.1)),
    _key("latent/fit_residual_train", "share", "lower", "latent/fit_residual on training pictures",
         FLOWRAY, (0.0, 0.05)),
    _key("latent/batch_slope", "-", "none",
         "slope of a training batch's z1 on freshly encoded means of its pictures", FLOWRAY,
         (0.9, 1.1)),
    _key("latent/stale_{share,suspects}", "share", "lower",
         "training latents (from all over the set; the most unusual) that are not what encoding the"
         " picture gives", FLOWRAY, (0.0, 0.0)),
    _key("known/{path,flow,kl,clip,dino,repa,anchor,tv,norm}", "-", "lower",
         "how far a loss (or x_t and v*) of a batch with a known answer is from it", FLOWRAY,
         (0.0, 1e-3)),
    _key("known/{flow,kl,clip,dino,repa,anchor,tv,norm}_gradient", "-", "lower",
         "the same of its gradient, over the right one's norm", FLOWRAY, (0.0, 1e-3)),
    _key("vae/psnr_{direct,twice}", "dB", "none",
         "PSNR of decoding z without unscaling, and unscaled twice", LOG_0919),
    _key("gain/median", "-", "none",
         "median ||v*|| / ||u||, a constant gain; it ignores direction", LOG_0919),
    _key("gain/{ls,median}_t{0..9}", "-", "none",
         "the least-squares gain, or the median one, of this tenth"),
    _key("gain/nmse_{none,ls,ls_t,median}", "-", "lower",
         "flow/nmse with no gain, the least-squares one, one per tenth, the median"),
    _key("gain/shoot_nmse_{none,ls,median}", "-", "lower",
         "shoot/nmse in 25 steps with no gain, the least-squares one, the median"),
    _key("variant/{fp32,bf16,aligned}_cos", "cosine", "higher",
         "flow/cos in fp32, under bf16, with x at the path's variance", LOG_0919),
    _key("variant/{fp32,bf16,aligned}_speed_ratio", "-", "none",
         "flow/speed_ratio of the same three calls", LOG_0919),
    _key("variant/aligned_shoot_nmse", "-", "lower",
         "shoot/nmse in 25 steps with x at the path's variance", LOG_0919),
    _key("data/samples", "count", "none", "training samples"),
    _key("data/epochs", "count", "none", "samples seen / data/samples"),
    _key("data/duplicate_share", "share", "lower",
         "training samples (the first 4096) whose latent is an earlier one's", FLOWRAY, (0.0, 0.2)),
    _key("data/near_share", "share", "lower",
         "the same of nearly an earlier one: nearer than two draws of"
         " one posterior, or than 0.03 of any two", FLOWRAY, (0.0, 0.4)),
    _key("data/near_typical", "-", "none",
         "median distance to the nearest other over that of any two"),
    _key("data/seen_share", "share", "lower",
         "held-out samples that are nearly a training one", FLOWRAY, (0.0, 0.25)),
    _key("data/word_auc", "share", "higher",
         "how surely the word that tells most tells its pictures (area under the curve, held out)"),
    _key("data/captions_wrong", "share", "lower",
         "captions whose picture is not what their best words say, training path"),
    _key("data/captions_wrong_low", "share", "lower",
         "the same less two standard deviations", FLOWRAY, (-1.0, 0.06)),
    _key("data/caption_same", "share", "lower", "captions that are the commonest one", FLOWRAY,
         (0.0, 0.5)),
    _key("data/caption_over_next", "-", "none", "times as many as the next commonest"),
    _key("data/caption_wordless", "share", "lower", "captions without a word", FLOWRAY,
         (0.0, 0.02)),
    _key("data/caption_full", "share", "none", "captions as long as the longest"),
    _key("data/caption_broken", "share", "lower",
         "captions as long as the longest that end within a word or wanting one", FLOWRAY,
         (0.0, 0.1)),
    _key("data/colour_{told,other}", "cosine", "none",
         "what names of colours do to pictures against those colours; with channels exchanged or"
         " inverted"),
    _key("data/colour_z", "-", "none",
         "what they do, in standard deviations above shuffled captions"),
    _key("data/colour_chroma", "of 1", "none", "mean difference of a pixel's channels"),
    _key("data/side_{across,down}", "share", "higher",
         "pictures with their mass where the caption says (left, right; top, bottom)"),
    _key("data/side_{across,down}_{high,low}", "share", "none",
         "its interval, of two standard deviations of a half"),
    _key("data/caption_classes", "count", "none", "distinct first captions among these"),
    _key("data/agreement", "R^2", "higher",
         "held-out ridge regression from a caption's words to z1, training path"),
    _key("data/agreement_shuffled", "R^2", "none", "the same with the pairs shuffled"),
    _key("data/batch_alike", "-", "none",
         "batch size * variance of the batches' mean z1 / variance of z1; of random batches 1"),
    _key("data/agreement_z", "-", "higher", "their difference in standard deviations of shuffles",
         FLOWRAY, (4.0, INF)),
    _key("train_set/{shoot_nmse,flow_nmse}", "-", "lower",
         "the probe on training samples; far below the held-out one: memorised"),
    _key("train_set/flow_cos", "cosine", "higher", "flow/cos on training samples"),
    _key("text/cos_prompts", "cosine", "lower",
         "mean cosine of mu over the prompts of the sample strip", LOG_0919, (-1.0, 0.9)),
    _key("logvar/{min,max}", "nats", "none", "least or greatest log sigma^2", PIPELINE),
    _key("logvar/clamped_share", "share", "lower", "share of log sigma^2 at a clamp", PIPELINE,
         (0.0, 0.05)),
    _key("mu/rms_over_std", "-", "none", "rms of mu / rms of sigma"),
    _key("finite/{parameters,ema,latents,forward,gradients}", "share", "higher",
         "share that is finite", LOSSES, (1.0, INF)),
    # pictures and speed
    _key("eval/mean_attribute_accuracy", "share", "higher",
         "mean accuracy over attributes, held-out single-object prompts"),
    _key("eval/all_correct", "share", "higher",
         "share of pictures with every attribute right, held-out single-object prompts"),
    _key("eval/named", "share", "higher",
         "share of pictures with all right that an open caption names, and one object"),
    _key("eval/coverage_excess", "share", "lower",
         "of open captions: total variation between pictures and data, beyond that of real draws"),
    _key("eval/frechet", "latent^2", "lower",
         "Frechet distance between drawn and real pictures, in latents"),
    _key("eval/kernel", "-", "lower",
         "kernel distance between drawn and real pictures, times 1000, unbiased; about 0 as in the"
         " data"),
    _key("eval/<score>", "share", "higher", "share of pictures that pass this check"),
    _key("eval/<set>/<score>", "share", "higher",
         "share of pictures of this set that pass this check"),
    _key("perf/images_per_s", "1/s", "higher", "train.batch_size / perf/step_s"),
    _key("perf/network_calls", "calls", "lower",
         "how often the velocity network is asked for a picture; under guidance twice at a time"),
    _key("perf/step_s", "s", "lower", "time of a training step, mean since the last row"),
    _key("perf/data_wait_s", "s", "lower",
         "time a step waited for its batch, mean since the last row"),
    _key("perf/mfu", "share", "higher",
         "model FLOPs per second, without recomputed ones, / dense bf16 peak of the devices"),
    _key("perf/memory_gb", "GB", "lower",
         "most memory of the lead rank so far: allocated on its GPU, else resident on the host"),
)
# fmt: on


def alternatives(pattern: str) -> Iterator[str]:
    """'a_{x,y}{0..1}' as a_x0, a_x1, a_y0, a_y1; free parts `<...>` stay."""
    braces = re.search(r"\{([^}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    parts = (
        [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else braces[1].split(",")
    )
    for part in parts:
        yield from alternatives(pattern[: braces.start()] + part + pattern[braces.end() :])


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, MetricKey], list[tuple[re.Pattern[str], MetricKey]]]:
    """(keys by concrete name, keys with a free part)."""
    concrete: dict[str, MetricKey] = {}
    free: list[tuple[re.Pattern[str], MetricKey]] = []
    for key in KEYS:
        for name in alternatives(key.name):
            if "<" in name:
                free.append((re.compile(re.sub(r"<\w+>", r"[\\w.@-]+", name)), key))
            else:
                concrete[name] = replace(key, name=name)
    return concrete, free


def describe(name: str) -> MetricKey | None:
    """What a concrete metric name means, under that name; None for a name that flowray does not
    write.
    """
    concrete, free = _table()
    if name in concrete:
        return concrete[name]
    found = next((key for pattern, key in free if pattern.fullmatch(name)), None)
    if found is None and name.startswith("ema/") and not name.startswith("ema/ema/"):
        found = describe(name.removeprefix("ema/"))
        return (
            None
            if found is None
            else replace(found, name=name, formula=f"{found.formula} (EMA weights)")
        )
    return None if found is None else replace(found, name=name)
