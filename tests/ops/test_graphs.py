"""A captured decode step serves any lengths: append, decode and a short prefill, replayed over other contents."""

import pytest
import torch

import cases
import pagewire as pw
import tolerance


@pytest.fixture(params=["cuda", "triton"])
def captured_by(request: pytest.FixtureRequest, device: torch.device) -> str:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    reason = pw.backends("cuda")[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("split_size", [None, 64])
@pytest.mark.parametrize("q_lens", [None, (3, 1, 2)], ids=["decode", "prefill"])
def test_replay_with_other_lengths(q_lens, split_size, captured_by, device):
    case = cases.Attention(
        (700, 90, 33), q_lens, heads=(8, 2), dtype=torch.bfloat16, split_size=split_size, max_q_len=4
    )
    call = cases.build(case, device)
    q, k_cache, v_cache, table, seq_lens = call.args[:5]
    new = torch.randn(3, 2, 64, device=device).bfloat16()
    # the last token of each request, written again
    slots = torch.stack([pw.page_slots(table[b], n - 1, n, 16)[0] for b, n in enumerate((700, 90, 33))])
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=device)
    keywords = {**call.kwargs, "out": out, "lse": lse, "return_lse": True, "backend": captured_by}

    def step() -> None:
        pw.append_kv(new, new, k_cache, v_cache, slots, backend=captured_by)
        getattr(pw, call.op)(*call.args, **keywords)

    step()  # compiled and allocated outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ((700, 90, 33), (650, 90, 5), (16, 17, 33)):
        seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        new.neg_()
        out.fill_(torch.nan)
        graph.replay()
        tolerance.check(call, out, lse)
