"""8-bit KV caches and wires in the server: two real processes, with a tiny random Llama."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pagewire.serve import config
from pagewire.transfer import frames
from serve.http_server import command, environment, serve, wait_for
from serve.tiny import make_tiny_llama

OPTIONS = ("--page-size", "4", "--pool-tokens", "512", "--prefill-chunk", "24")
PROMPT = [50 + 7 * i % 200 for i in range(70)]
ROWS = 70 * 2 * 2 * 2  # tokens, layers, K and V, heads
SCALED = 16 + 4  # bytes of a row of 16 values with its scale


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=None))


def test_the_front_offers_what_the_wire_has():
    """It does not import `transfer`."""
    assert set(config.KV_DTYPES) == set(frames.DTYPES) and set(config.SCALED_DTYPES) == set(frames.SCALED_DTYPES)


def ask(folder: Path, *options: str) -> tuple[np.ndarray, dict]:
    """The logits of the first token, and the request's events by name."""
    with serve(*OPTIONS, "--record-dir", str(folder), *options) as server:
        status, answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=12, temperature=0)
        assert status == 200 and answer["usage"]["completion_tokens"] == 12

        def events() -> dict:
            newest = server.request("GET", "/debug/requests")[1]["requests"][0]
            return {event["name"]: event for event in newest["events"]}

        wanted = {"decode", "request"} | (set() if "--colocated" in options else {"transfer_total"})
        wait_for(lambda: wanted <= set(events()), 5)
        decode = folder / f"{answer['id']}-0.decode.safetensors"
        wait_for(decode.exists, 5)
        (first,) = load_file(folder / f"{answer['id']}-0.prefill.safetensors")["logits"]
        (second, *_) = load_file(decode)["logits"]
        return np.stack([first, second]), events()


@pytest.fixture(scope="module")
def exact(model, tmp_path_factory) -> np.ndarray:
    return ask(tmp_path_factory.mktemp("exact"), "--model", model, "--colocated")[0]


@pytest.mark.parametrize(
    ("options", "row_bytes", "worst"),
    [
        (("--kv-dtype", "fp8_e4m3"), SCALED, 2.0),
        (("--kv-dtype", "int8", "--kv-wire-dtype", "bfloat16"), 2 * 16, 0.5),
        (("--dtype", "bfloat16", "--kv-wire-dtype", "int8"), SCALED, 1.0),
    ],
    ids=str,
)
def test_8_bits(model, exact, options, row_bytes, worst, tmp_path) -> None:
    """What D keeps is bit by bit what P's KV becomes on that way, and the logits are near those of a float cache."""
    logits, events = ask(tmp_path, "--model", model, "--verify-kv", *options)
    verify = events["kv_verify"]["args"]
    assert verify["p_sha256"] == verify["d_sha256"]
    padding = events["transfer_total"]["args"]["bytes"] - ROWS * row_bytes
    assert 0 <= padding < 16 * 16
    differences = np.abs(logits - exact).max(1)
    assert logits[0].argmax() == exact[0].argmax()  # so that the second token's follow the same
    assert (0 < differences).all() and (differences < worst).all(), differences


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-dtype", "bfloat16"), "pagewire serve: kv_dtype: expected null or one of float32, float8_e4m3fn"),
        (("--kv-dtype", "fp4"), "argument --kv-dtype: invalid choice: 'fp4'"),
        (("--kv-wire-dtype", "int4"), "argument --kv-wire-dtype: invalid choice: 'int4'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_sentence(model, options, words) -> None:
    result = subprocess.run(
        command("--model", model, "--port", "0", *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode in (1, 2) and words in result.stderr.splitlines()[-1]
