"""The gated delta rule of arXiv 2412.06464 (equation 10) in numpy: a value head and a place at a time, in float64."""

import numpy as np

from llama_jax.nn import GatedDeltaNet


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def delta_in_numpy(config: GatedDeltaNet, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The result for one text [T, D]."""
    size, values, per_key = config.key_dim, config.value_dim, config.num_value_heads // config.num_key_heads
    y = np.zeros_like(x)
    for head in range(config.num_value_heads):
        key_head, inner = divmod(head, per_key)
        of_head = slice(inner * values, (inner + 1) * values)
        fused = x @ w["in_proj_qkvz.weight"][:, key_head]
        q, k, v, z = np.split(fused, [size, 2 * size, 2 * size + per_key * values], axis=-1)
        q = unit(convolved(q, w["conv_q"][key_head])) / np.sqrt(size)
        k = unit(convolved(k, w["conv_k"][key_head]))
        v = convolved(v[:, of_head], w["conv_v"][key_head, of_head])
        b, a = (x @ w["in_proj_ba.weight"][:, key_head, at] for at in (inner, per_key + inner))
        decay = np.exp(-np.exp(w["A_log"][head]) * np.log1p(np.exp(a + w["dt_bias"][head])))
        state = np.zeros((values, size))
        for t in range(len(x)):
            beta = 1 / (1 + np.exp(-b[t]))
            state = decay[t] * state @ (np.eye(size) - beta * np.outer(k[t], k[t])) + beta * np.outer(v[t], k[t])
            read = state @ q[t]
            normed = read / np.sqrt(np.mean(read**2) + config.eps) * w["norm.weight"]
            y[t] += (normed * silu(z[t, of_head])) @ w["out_proj.weight"][key_head, of_head]
    return y


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """SiLU of the causal convolution of each channel; the weight's last entry is the token's own."""
    padded = np.pad(x, ((weight.shape[-1] - 1, 0), (0, 0)))
    return silu(np.stack([(padded[t : t + weight.shape[-1]] * weight.T).sum(0) for t in range(len(x))]))
