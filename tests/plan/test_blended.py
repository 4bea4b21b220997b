"""Input and output priced together, cached input, and break-even against an API."""

import json
from typing import Any

import pytest

from manyhands.errors import ConfigError
from manyhands.plan.price import ApiPrice, blended, read_api_price

from ..small_runs import manyhands

H100 = ("qwen3-30b-a3b", "--machine", "h100", "--price", "2", "--context", "1k")


def section(*arguments: str, name: str = "blended") -> dict[str, Any]:
    done = manyhands("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["sections"]
    return found[name] if name else found


def test_blended_by_hand() -> None:
    """V3's API in 2025: 0.27 in, 0.07 cached, 1.10 out. 3 in to 1 out, half of it cached: (3·0.17 + 1.10) / 4."""
    api = read_api_price("0.27/0.07/1.10")
    assert api == ApiPrice(0.27, 1.10, 0.07) and read_api_price("0.27/1.10") == ApiPrice(0.27, 1.10, 0.27)
    assert blended(api, 3, 0.5) == pytest.approx((3 * 0.17 + 1.10) / 4, rel=1e-12)
    assert blended(api, 0, 0.5) == 1.10 and blended(api, 3, 0) == pytest.approx((0.81 + 1.10) / 4, rel=1e-12)
    assert blended(read_api_price("0.27/1.10"), 3, 0.9) == pytest.approx(blended(api, 3, 0), rel=1e-12)


@pytest.mark.parametrize("text", ["1", "1/2/3/4", "a/b", "1/nan", "1/inf", "1/-2", "-1/2", "0/0", "", "1e9/1"])
def test_what_is_no_price_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="expected IN/OUT or IN/CACHED/OUT in USD"):
        read_api_price(text)


def test_a_machine_of_ones_own() -> None:
    """Its blended price is that of the two prices beside it; a cached token costs nothing."""
    parts = {found["label"]: found["value"] for found in section(*H100, "--in-out", "4", name="price")["figures"]}
    out, into = parts["10^6 tokens out, batch 64"], parts["10^6 tokens in, 16 x 1k"]
    for cached in (0.0, 0.75):
        best, likely = section(*H100, "--in-out", "4", "--cached", str(cached))["figures"]
        assert best["value"] == pytest.approx((4 * (1 - cached) * into + out) / 5, rel=1e-9)
        assert likely["value"] > best["value"]


def test_break_even() -> None:
    """At 0.5 USD blended an hour of 2 USD is 4 M tokens; the share is what that is of the machine's expected price."""
    found = section(*H100, "--api-price", "0.5/0.5")
    _, own, api, tokens, share = (figure["value"] for figure in found["figures"])
    assert api == pytest.approx(0.5) and tokens == pytest.approx(4e6) and share == pytest.approx(own / 0.5)
    assert "cheaper if it is busy more than" in found["notes"][-1]
    dear = section(*H100, "--api-price", "0.0001/0.0001")
    assert (
        dear["figures"][-1]["value"] > 1 and dear["notes"][-1] == "the API is cheaper even were the machine never idle"
    )


def test_no_price_of_what_is_not_known() -> None:
    blind = section("qwen3-30b-a3b", "--machine", "m4-max", "--price", "1", "--cached", "0")
    large = section("deepseek-v3", "--machine", "h100", "--price", "1", "--in-out", "3")
    assert "without a matrix rate" in blind["notes"][0] and large["notes"] == ["no price: it does not fit"]
    for option in (("--cached", "0.5"), ("--in-out", "3"), ("--api-price", "1/2")):
        done = manyhands("plan", "qwen3-30b-a3b", "--machine", "h100", *option)
        assert done.returncode == 2 and done.stderr.strip() == f"manyhands: {option[0]} goes with --price"
