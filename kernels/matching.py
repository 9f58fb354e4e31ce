"""gradient_matching: the residual nabla-DB loss of Nabla-R2D3 (arXiv 2506.15684) and its gradient, fused.

Guidance, residual, both losses and their gradients in one pass over the inputs forward and one backward.
Nothing of the latents' size is written except the two gradients. Lift this file on its own: it needs torch,
and triton where a GPU is to be used.

Mathematics (E4-E6 are the README's numbers)

    u, t, ur, tr   the network's and the frozen reference's eps, unconditional and with text; s = guidance
    eps_theta    = u + s (t - u)   =  t + (s - 1) (t - u)             classifier-free guidance
    eps_ref      = tr + (s - 1) (tr - ur)
    d            = eps_theta - eps_ref  =  dt + (s - 1) (dt - du),    du := u - ur,   dt := t - tr
    residual     = -k d - weight g                                    g = reward_grad              (E6)
    match        = (1/n) sum residual^2                               n elements per sample        (E4)
    reg          = (1/n) sum (eps_theta - eps_old)^2                  lambda is the caller's       (E5)

    Forward differences first and scales afterwards: at the sampler's last step k is large (of 20 steps, 1,760
    with diffusers' default betas, DiffSplat-PixArt's, and 265 with Stable Diffusion's), and k times the
    rounding errors of eps_theta and eps_ref would be all that is left of a small d. The form
    t + (s - 1) (t - u) has rounding errors of the size of t - u only, and is exactly t at s = 1.

    Backward, with the incoming gradients G_match and G_reg, one number per sample each:

    G_eps  = (2/n) ( -k G_match residual + G_reg (eps_theta - eps_old) )
    G_t    = s G_eps,      G_u = (1 - s) G_eps                        exactly zero at s = 1

Contract: M samples of any shape, n elements each; every tensor on one device

    eps_uncond   (M, *shape)  float32 | bf16 | fp16   u; gets a gradient of its own dtype
    eps_text     (M, *shape)  float32 | bf16 | fp16   t; gets a gradient of its own dtype
    ref_uncond, ref_text      like them               ur, tr; constants
    eps_old, reward_grad      like them               the rollout's guided prediction, g; constants
    guidance     number, or (M,) tensor               s; constant
    k, weight    (M,) tensors                         weight = beta w(s), or k = 1 and weight = beta w(s) / k
    returns match, reg: (M,) float32

    eps_uncond and ref_uncond may both be None with guidance = 1: only the conditional branch is matched, with
    eps_theta = eps_text. Dtypes may differ between the tensors; all arithmetic is float32. A float64 latent
    takes the PyTorch path, which then computes and returns float64. A gradient in fp16 overflows where k^2
    is large, unless the caller scales the loss. A constant that requires a gradient raises: a silent zero
    would be worse. The Triton path copies inputs that are not contiguous, uses no atomics and is
    bit-identical from run to run. It can be captured in a CUDA graph; torch.compile goes around it. Its
    second derivatives raise; the PyTorch path's are autograd's.
"""
import numbers

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path needs no triton
    triton = None


# ---- PyTorch: the CPU path, and the specification of the kernels -------------------------------------------


def _any_float64(tensors):
    return any(x is not None and x.dtype == torch.float64 for x in tensors)


def _guide(uncond, text, guidance):
    """Classifier-free guidance; being linear, it serves predictions and their differences alike."""
    return text if uncond is None else text + (guidance - 1) * (text - uncond)


def gradient_matching_torch(
    eps_uncond, eps_text, ref_uncond, ref_text, eps_old, reward_grad, guidance, k, weight
):
    """The formulas at the head of this file, differentiated by autograd; arguments of gradient_matching."""
    M = eps_text.shape[0]
    tensors = (eps_uncond, eps_text, ref_uncond, ref_text, eps_old, reward_grad)
    dtype = torch.float64 if _any_float64(tensors) else torch.float32
    u, t, ur, tr, old, g = (None if x is None else x.reshape(M, -1).to(dtype) for x in tensors)  # [M, n]
    k, weight = k.to(dtype)[:, None], weight.to(dtype)[:, None]  # [M, 1]
    s = guidance.to(dtype)[:, None] if torch.is_tensor(guidance) else guidance

    residual = -k * _guide(None if u is None else u - ur, t - tr, s) - weight * g  # (E6)
    drift = _guide(u, t, s) - old
    return residual.square().mean(1), drift.square().mean(1)  # (E4), (E5)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024  # elements per program: with 4 warps 8 a thread, so each input is read in 16-byte pieces
LAUNCH = dict(BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)

if triton is not None:

    @triton.jit
    def _load(ptr, base, lane, mask):
        # base is int64 and uniform, lane int32. Lanes past the end read zeros everywhere: they add nothing.
        return tl.load(ptr + base + lane, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _errors(u_ptr, t_ptr, ur_ptr, tr_ptr, old_ptr, g_ptr, s, k, weight, base, lane, mask,
                HAS_UNCOND: tl.constexpr):
        """residual (E6) and eps_theta - eps_old of one block."""
        t = _load(t_ptr, base, lane, mask)
        d = t - _load(tr_ptr, base, lane, mask)
        eps = t
        if HAS_UNCOND:
            u = _load(u_ptr, base, lane, mask)
            du = u - _load(ur_ptr, base, lane, mask)
            eps = t + (s - 1) * (t - u)
            d = d + (s - 1) * (d - du)
        residual = -k * d - weight * _load(g_ptr, base, lane, mask)
        return residual, eps - _load(old_ptr, base, lane, mask)

    @triton.jit(do_not_specialize=["blocks"])
    def _forward_kernel(
        u_ptr, t_ptr, ur_ptr, tr_ptr, old_ptr, g_ptr,  # [M, n] each; u, ur unused if not HAS_UNCOND
        s_ptr,  # [M] if S_TENSOR, else the number itself
        k_ptr, weight_ptr,  # [M]
        match_ptr, reg_ptr,  # [M, blocks] float32 out: this program's share of the two means
        n, blocks,
        HAS_UNCOND: tl.constexpr, S_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        m = program // blocks
        start = (program % blocks).to(tl.int64) * BLOCK
        lane = tl.arange(0, BLOCK)
        s = tl.load(s_ptr + m).to(tl.float32) if S_TENSOR else s_ptr
        k, weight = tl.load(k_ptr + m).to(tl.float32), tl.load(weight_ptr + m).to(tl.float32)
        residual, drift = _errors(u_ptr, t_ptr, ur_ptr, tr_ptr, old_ptr, g_ptr, s, k, weight,
                                  m.to(tl.int64) * n + start, lane, lane < n - start, HAS_UNCOND)
        # The caller adds the partial sums up in a fixed order: no atomics, the same bits every time.
        tl.store(match_ptr + program, tl.sum(residual * residual) / n)  # (E4)
        tl.store(reg_ptr + program, tl.sum(drift * drift) / n)  # (E5)

    @triton.jit(do_not_specialize=["blocks", "G_match_stride", "G_reg_stride"])
    def _backward_kernel(
        u_ptr, t_ptr, ur_ptr, tr_ptr, old_ptr, g_ptr, s_ptr, k_ptr, weight_ptr,  # as in the forward kernel
        G_match_ptr, G_reg_ptr,  # [M] float32 with the strides below: .mean() sends back an expanded number
        G_match_stride, G_reg_stride,
        G_u_ptr, G_t_ptr,  # [M, n] out, dtypes of u and t; unused where not wanted
        n, blocks,
        HAS_UNCOND: tl.constexpr, S_TENSOR: tl.constexpr, WANT_U: tl.constexpr, WANT_T: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        m = program // blocks
        start = (program % blocks).to(tl.int64) * BLOCK
        base = m.to(tl.int64) * n + start
        lane = tl.arange(0, BLOCK)
        mask = lane < n - start
        s = tl.load(s_ptr + m).to(tl.float32) if S_TENSOR else s_ptr
        k, weight = tl.load(k_ptr + m).to(tl.float32), tl.load(weight_ptr + m).to(tl.float32)
        residual, drift = _errors(u_ptr, t_ptr, ur_ptr, tr_ptr, old_ptr, g_ptr, s, k, weight,
                                  base, lane, mask, HAS_UNCOND)
        from_match = -2 * k * tl.load(G_match_ptr + m * G_match_stride) / n
        from_reg = 2 * tl.load(G_reg_ptr + m * G_reg_stride) / n
        G_eps = from_match * residual + from_reg * drift
        if WANT_U:
            tl.store(G_u_ptr + base + lane, ((1 - s) * G_eps).to(G_u_ptr.dtype.element_ty), mask=mask)
        if WANT_T:
            G_t = s * G_eps if HAS_UNCOND else G_eps
            tl.store(G_t_ptr + base + lane, G_t.to(G_t_ptr.dtype.element_ty), mask=mask)


class _Once(torch.autograd.Function):
    """Gradients as they are. To differentiate them raises: nothing would be found, and taken for zero."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("gradient_matching: its gradients cannot be differentiated again by backend "
                           "'triton': use backend='torch'")


class _GradientMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, t, ur, tr, old, g, s, k, weight):  # contiguous; s is a tensor or a float
        M, n = t.shape[0], t.numel() // t.shape[0]
        ctx.save_for_backward(u, t, ur, tr, old, g, k, weight, s if torch.is_tensor(s) else None)
        ctx.s, ctx.n, ctx.blocks = s if not torch.is_tensor(s) else None, n, triton.cdiv(n, BLOCK)
        means = t.new_empty((2, M, ctx.blocks), dtype=torch.float32)
        with torch.cuda.device_of(t):
            _forward_kernel[(M * ctx.blocks,)](
                t if u is None else u, t, tr if ur is None else ur, tr, old, g, s, k, weight,
                *means, n, ctx.blocks,
                HAS_UNCOND=u is not None, S_TENSOR=torch.is_tensor(s), **LAUNCH)
        match, reg = means.sum(2)  # one launch for both
        return match, reg

    @staticmethod
    def backward(ctx, G_match, G_reg):
        with torch.no_grad():
            wanted = _GradientMatching.differentiate(ctx, G_match, G_reg)
        found = [G for G in wanted if G is not None]
        if torch.is_grad_enabled():
            sources = [x for x in ctx.saved_tensors[:2] if x is not None]
            found = _Once.apply(len(found), *found, *sources, G_match, G_reg)
        found = iter(found)
        return *(None if G is None else next(found) for G in wanted), *7 * (None,)

    @staticmethod
    def differentiate(ctx, G_match, G_reg):
        u, t, ur, tr, old, g, k, weight, s = ctx.saved_tensors
        G_u = torch.empty_like(u) if ctx.needs_input_grad[0] else None
        G_t = torch.empty_like(t) if ctx.needs_input_grad[1] else None
        with torch.cuda.device_of(t):
            _backward_kernel[(t.shape[0] * ctx.blocks,)](
                t if u is None else u, t, tr if ur is None else ur, tr, old, g, ctx.s if s is None else s,
                k, weight, G_match, G_reg, G_match.stride(0), G_reg.stride(0),
                t if G_u is None else G_u, t if G_t is None else G_t, ctx.n, ctx.blocks,
                HAS_UNCOND=u is not None, S_TENSOR=s is not None,
                WANT_U=G_u is not None, WANT_T=G_t is not None, **LAUNCH)
        return G_u, G_t


# ---- the public function -----------------------------------------------------------------------------------


def gradient_matching(
    eps_uncond,  # (M, *shape), or None with guidance = 1
    eps_text,  # (M, *shape)
    ref_uncond,  # (M, *shape), or None together with eps_uncond
    ref_text,  # (M, *shape)
    eps_old,  # (M, *shape), guided
    reward_grad,  # (M, *shape)
    guidance,  # number or (M,)
    k,  # (M,)
    weight,  # (M,)
    *,
    backend=None,  # "torch" | "triton" | None: triton for tensors on a GPU, torch otherwise
):
    """Per-sample match (E4) and reg (E5), each (M,); differentiable in eps_uncond and eps_text.

    ValueError: a shape, dtype, device, guidance or backend that does not fit; a constant that wants a
    gradient.
    """
    if (eps_uncond is None) != (ref_uncond is None):
        raise ValueError("eps_uncond and ref_uncond: wanted two tensors or two None, got one of each")
    if not torch.is_tensor(guidance) and not isinstance(guidance, numbers.Real):
        raise ValueError(f"guidance: wanted a number or a tensor (M,), got {guidance!r}")
    if eps_uncond is None and (torch.is_tensor(guidance) or guidance != 1):
        raise ValueError(f"guidance: wanted the number 1 where eps_uncond is None, got {guidance}")
    if not torch.is_tensor(eps_text) or eps_text.numel() == 0 or eps_text.ndim == 0:
        got = tuple(eps_text.shape) if torch.is_tensor(eps_text) else type(eps_text).__name__
        raise ValueError(f"eps_text: wanted a tensor (M, *shape) with at least one element, got {got}")
    latents = {"eps_uncond": eps_uncond, "eps_text": eps_text, "ref_uncond": ref_uncond, "ref_text": ref_text,
               "eps_old": eps_old, "reward_grad": reward_grad}
    per_sample = {"k": k, "weight": weight, **({"guidance": guidance} if torch.is_tensor(guidance) else {})}
    for name, x in {**latents, **per_sample}.items():
        if x is None and name.endswith("uncond"):
            continue
        wanted = tuple(eps_text.shape) if name in latents else (eps_text.shape[0],)
        got = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        if got != wanted:
            raise ValueError(f"{name}: wanted a tensor of shape {wanted}, got {got}")
        if x.device != eps_text.device or not x.is_floating_point():
            raise ValueError(f"{name}: wanted floats on {eps_text.device}, got {x.dtype} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled() and name not in ("eps_uncond", "eps_text"):
            raise ValueError(f"{name}: wanted a constant, got a tensor that requires grad: detach it")
    double = _any_float64(latents.values())
    if backend is None:
        backend = "triton" if eps_text.is_cuda and triton is not None and not double else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend: wanted 'torch', 'triton' or None, got {backend!r}")
    arguments = (*latents.values(), guidance, k, weight)
    if backend == "torch":
        return gradient_matching_torch(*arguments)
    if triton is None:
        raise ValueError("backend 'triton' was asked for, but triton is not installed")
    if not eps_text.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 in the environment")
    if double:
        raise ValueError("backend 'triton' computes in float32, got float64 tensors (use backend='torch')")
    apply = _GradientMatching.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)
    latents = [None if x is None else x.contiguous() for x in latents.values()]
    guidance = guidance.contiguous() if torch.is_tensor(guidance) else float(guidance)
    return apply(*latents, guidance, k.contiguous(), weight.contiguous())
