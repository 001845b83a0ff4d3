"""`attntune.functional` against PyTorch."""

import os
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

from attntune import functional
from attntune.errors import InputError
from attntune.kernel_cache import KernelCache
from attntune.ops import Attention
from attntune.target import native
from attntune.templates.cpu import bf16

oracle = torch.nn.functional.scaled_dot_product_attention
attend = functional.scaled_dot_product_attention


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """A cache of this module's own."""
    own = KernelCache(tmp_path_factory.mktemp("kernels"))
    theirs, functional._KERNELS = functional._KERNELS, own
    functional._calls.clear()
    yield own
    functional._KERNELS = theirs
    functional._calls.clear()


def operands(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def agree(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=4e-6, atol=4e-6)


Q, K = (2, 6, 19, 24), (2, 6, 37, 24)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ((Q, K, K), {}),
        ((Q, K, K), {"is_causal": True}),
        ((Q, K, K), {"scale": 0.3}),
        ((Q, K, K), {"scale": 24**-0.5}),
        ((Q, (2, 2, 37, 24), (2, 2, 37, 24)), {"enable_gqa": True}),
        ((Q, (2, 2, 37, 24), (2, 3, 37, 24)), {"enable_gqa": True}),
        ((Q, (2, 1, 37, 24), (2, 1, 37, 24)), {}),
        ((Q, (1, 6, 37, 24), (2, 1, 37, 24)), {}),
        (((3, 19, 24), (3, 37, 24), (3, 37, 24)), {"is_causal": True}),
        (((6, 19, 24), (2, 37, 24), (2, 37, 24)), {"enable_gqa": True}),
        (((19, 24), (37, 24), (37, 24)), {}),
        (((2, 1, 3, 5, 16), (2, 2, 3, 7, 16), (1, 2, 3, 7, 16)), {}),
        ((Q, K, (2, 6, 37, 40)), {}),
        ((Q, K, (2, 6, 37, 8)), {"is_causal": True}),
        ((Q, (2, 6, 11, 24), (2, 6, 11, 24)), {"is_causal": True}),
        (((1, 4, 1, 64), (1, 4, 130, 64), (1, 4, 130, 64)), {}),
        (((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8)), {}),
        (((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8)), {}),
        (((0, 3, 4, 8), (0, 3, 5, 8), (0, 3, 5, 8)), {}),
    ],
)
def test_it_agrees_with_pytorch(shapes, options):
    query, key, value = operands(*shapes)
    expected = oracle(query, key, value, **options)
    got = attend(query, key, value, **options)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float32
    agree(got, expected)
    array = attend(query.numpy(), key.numpy(), value.numpy(), **options)
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, got.numpy())


def seen(shape, seed=1):
    """True where a key may be seen; the third query, where there is one, sees none."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    if shape[-2] > 2:
        mask[..., 2, :] = False
    return mask


@pytest.mark.parametrize(
    "shape",
    [(19, 37), (2, 1, 1, 37), (2, 6, 19, 37), (2, 1, 19, 37), (1, 6, 19, 37), (6, 19, 37), (1, 37), (2, 1, 19, 1)],
)
def test_masks(shape):
    query, key, value = operands(Q, K, K)
    mask = seen(shape)
    agree(attend(query, key, value, mask), oracle(query, key, value, mask))
    bias = torch.randn(shape).masked_fill(~mask, -torch.inf)
    expected = oracle(query, key, value, bias)
    agree(attend(query, key, value, bias), expected)
    agree(attend(query.numpy(), key.numpy(), value.numpy(), bias.numpy()), expected)


def test_a_mask_beside_is_causal():
    query, key, value = operands(Q, K, K)
    mask = seen((19, 37))
    agree(
        attend(query, key, value, mask, is_causal=True),
        oracle(query, key, value, mask & torch.ones(19, 37, dtype=torch.bool).tril()),
    )


def test_masks_without_dimensions_of_batch_or_heads():
    query, key, value = operands((19, 24), (37, 24), (37, 24))
    for mask in (seen((19, 37)), seen((1, 37)), torch.randn(19, 37)):
        agree(attend(query, key, value, mask), oracle(query, key, value, mask))
    query, key, value = operands((2, 2, 3, 5, 16), (2, 2, 3, 7, 16), (2, 2, 3, 7, 16))
    for mask in (seen((2, 1, 1, 1, 7)), seen((2, 1, 5, 7)), torch.randn(2, 1, 3, 5, 7)):
        agree(attend(query, key, value, mask), oracle(query, key, value, mask))


def test_a_query_without_keys_gives_zeros():
    query, key, value = operands(Q, K, K)
    for covered in (False, -torch.inf, torch.finfo(torch.float32).min):
        mask = torch.full((19, 37), covered) if covered is False else torch.zeros(19, 37)
        mask[2] = covered
        mask[3:] = True if covered is False else 0.0
        got = attend(query, key, value, mask)
        assert not got[:, :, 2].any()
        assert got[:, :, 3].any()


@pytest.mark.skipif(not bf16.available(native()), reason="this CPU lacks AVX512-BF16")
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": "random"}])
def test_bfloat16(library, options):
    query, key, value = (x.bfloat16() for x in operands((2, 3, 33, 32), (2, 3, 33, 32), (2, 3, 33, 32)))
    if "attn_mask" in options:
        options = {"attn_mask": operands((33, 33))[0] > 0}
    wide = oracle(query.double(), key.double(), value.double(), **options)
    if library == "torch":
        found = attend(query, key, value, **options)
        assert found.dtype == torch.bfloat16
    else:
        arrays = [x.float().numpy().astype(ml_dtypes.bfloat16) for x in (query, key, value)]
        found = attend(*arrays, *(mask.numpy() for mask in options.values() if isinstance(mask, torch.Tensor)),
                       **{n: v for n, v in options.items() if n != "attn_mask"})  # fmt: skip
        assert found.dtype == ml_dtypes.bfloat16
        found = torch.from_numpy(found.astype(np.float32))
    rtol, atol = Attention(2, 3, 33, 33, 32, dtype="bfloat16").tolerance()
    torch.testing.assert_close(found.double(), wide, rtol=rtol, atol=atol)


@pytest.mark.parametrize("causal", [False, True])
def test_weights(causal):
    query, key, value = operands(Q, K, K)
    out, weights = attend(query, key, value, is_causal=causal, return_weights=True)
    agree(out, oracle(query, key, value, is_causal=causal))
    scores = query @ key.mT / 24**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(19, 37, dtype=torch.bool).tril(), -torch.inf)
    agree(weights, scores.softmax(-1))


def test_views_of_every_kind():
    query, key, value = operands((2, 19, 6, 24), (2, 37, 6, 24), (2, 37, 6, 24))
    turned = [x.transpose(1, 2) for x in (query, key, value)]
    expected = oracle(*turned)
    got = attend(*turned)
    agree(got, expected)
    assert got.stride() == expected.stride()
    assert np.array_equal(attend(*(x.numpy() for x in turned)), got.numpy())
    plain = [x.contiguous() for x in turned]
    agree(attend(plain[0], turned[1], plain[2]), expected)
    wide = [torch.zeros(*x.shape[:-1], 2 * x.shape[-1]) for x in plain]
    strided = [w[..., ::2].copy_(x) for w, x in zip(wide, plain, strict=True)]
    agree(attend(*strided), expected)
    backward = [x.numpy()[:, :, ::-1] for x in plain]
    agree(attend(*(np.ascontiguousarray(x)[:, :, ::-1] for x in backward)), expected)


@pytest.mark.parametrize("offset", [1, 4, 15])
def test_misaligned_operands_are_copied(offset):
    plain = operands(Q, K, K)
    shifted = []
    for x in plain:
        raw = torch.zeros(x.numel() + 32)
        raw[offset : offset + x.numel()] = x.flatten()
        shifted.append(raw[offset : offset + x.numel()].view(x.shape))
    expected = attend(*plain)
    assert torch.equal(attend(*shifted), expected)
    arrays = [x.numpy() for x in shifted]
    for array in arrays:
        array.flags.writeable = False
    assert np.array_equal(attend(*arrays), expected.numpy())
    bias = torch.randn(19, 37)
    raw = torch.zeros(bias.numel() + 32)
    raw[offset : offset + bias.numel()] = bias.flatten()
    agree(attend(*plain, raw[offset : offset + bias.numel()].view(19, 37)), oracle(*plain, bias))


def test_operands_are_not_changed_and_results_are_new():
    plain = operands(Q, K, K)
    copies = [x.clone() for x in plain]
    first = attend(*plain)
    kept = first.clone()
    second = attend(plain[0] * 2, plain[1], plain[2])
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    assert all(torch.equal(a, b) for a, b in zip(plain, copies, strict=True))


def test_many_threads_give_the_same_bits():
    sets = [operands(Q, K, K, seed=seed) for seed in range(4)]
    bias = torch.randn(2, 1, 19, 37)
    expected = [attend(*each, bias.bool()) for each in sets]
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(attend(*sets[i % 4], bias.bool()), expected[i % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_computes_and_compiles_by_itself():
    query, key, value = (x.numpy() for x in operands(Q, K, K))
    expected = attend(query, key, value)
    child = os.fork()
    if child == 0:
        try:
            same = np.array_equal(attend(query, key, value), expected)
            new = attend(query[:, :5], key[:, :5], value[:, :5])
            os._exit(0 if same and np.array_equal(new, expected[:, :5]) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(attend(query, key, value), expected)


def test_gradients_are_refused_only_where_they_would_be_recorded():
    query, key, value = operands(Q, K, K)
    query.requires_grad_()
    with pytest.raises(InputError, match="no_grad"):
        attend(query, key, value)
    with torch.no_grad():
        agree(attend(query, key, value), oracle(query, key, value))
    agree(attend(query.detach(), key, value), oracle(query, key, value).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p to be 0"),
        ({"query": torch.zeros(24)}, r"query to have at least 2 dimensions, got shape \(24,\)"),
        ({"query": torch.zeros(*Q, dtype=torch.float64)}, "of one dtype"),
        ({"query": np.zeros(Q, np.float32)}, "got both"),
        ({"query": [[1.0]]}, "query to be a NumPy array or a torch tensor, got list"),
        ({"key": torch.zeros(2, 6, 37, 25)}, "query and key to have the same last dimension"),
        ({"value": torch.zeros(2, 6, 36, 24)}, "key and value the same last but one"),
        ({"key": torch.zeros(2, 2, 37, 24)}, "enable_gqa=True"),
        ({"key": torch.zeros(2, 4, 37, 24), "enable_gqa": True}, "divide those of query"),
        ({"attn_mask": torch.zeros(20, 37)}, r"attn_mask to broadcast to \(2, 6, 19, 37\)"),
        ({"attn_mask": torch.zeros(3, 2, 6, 19, 37)}, "attn_mask to broadcast"),
        ({"attn_mask": torch.zeros(37)}, "attn_mask to have at least 2 dimensions"),
        ({"attn_mask": torch.zeros(19, 37, dtype=torch.int64)}, "attn_mask of dtype bool, float32"),
        ({"attn_mask": np.zeros((19, 37), np.float32)}, "got both"),
        ({"scale": float("nan")}, "scale to be finite"),
        ({"query": torch.zeros(2, 6, 19, 0), "key": torch.zeros(2, 6, 37, 0)}, "head_dim to be at least 1"),
        ({"query": torch.zeros(Q, device="meta")}, "query to be a CPU tensor"),
        ({"query": torch.zeros(Q).to_sparse()}, "strided"),
    ],
)
def test_misuse_is_named(change, message):
    query, key, value = operands(Q, K, K)
    with pytest.raises(InputError, match=message):
        attend(**{"query": query, "key": key, "value": value, **change})


def test_dtypes_without_kernels_are_named():
    half = [x.half() for x in operands(Q, K, K)]
    with pytest.raises(InputError, match="float32 or bfloat16, got float16"):
        attend(*half)
    double = [x.numpy().astype(np.float64) for x in operands(Q, K, K)]
    with pytest.raises(InputError, match="got float64"):
        attend(*double)
