"""From `producer.submit` through a real server and a real worker process to the answer, and what the cache did."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from common import keys
from producer import GenerationFailed
from tests.integration.conftest import KV_BYTES, POISON, Pipeline

pytestmark = pytest.mark.timeout(1_800)  # the first test of each worker waits for it to load, all for results
_number = itertools.count()


def unique(words: int) -> str:
    """Return a text that no other test sent, so that nothing of it is in the cache."""
    mark = next(_number)
    return " ".join(f"w{mark}x{i}" for i in range(words))


class TestFullPipelineIntegration:
    """A job's whole way."""

    def test_simple_chat_completion(self, pipeline: Pipeline) -> None:
        ticket = pipeline.submit("Say hello.", system=unique(3), max_tokens=8)
        result = ticket.result(timeout_s=300)
        assert result.status == "finished"
        assert result.text is not None
        assert result.usage is not None
        assert 1 <= result.usage.completion_tokens <= 8
        assert result.usage.prompt_tokens == result.usage.cached_tokens + result.usage.prefill_tokens
        with Redis.from_url(pipeline.url, decode_responses=True) as client:
            fields = client.hgetall(keys.result(ticket.id))
        assert fields["text"] == result.text
        assert fields["prompt_tokens"] == str(result.usage.prompt_tokens)
        assert fields["finish_reason"] in {"stop", "length"}

    def test_prefix_caching(self, pipeline: Pipeline) -> None:
        system = unique(12)
        first = pipeline.run("One?", system=system, max_tokens=4).usage
        second = pipeline.run("Two?", system=system, max_tokens=4).usage
        assert first is not None
        assert second is not None
        assert second.cached_tokens > 0.6 * second.prompt_tokens
        assert second.prefill_tokens < 0.5 * first.prefill_tokens

    def test_concurrent_requests(self, pipeline: Pipeline) -> None:
        system = unique(10)
        tickets = [pipeline.submit(f"Question {i}?", system=system, max_tokens=6) for i in range(24)]
        alone = {i: pipeline.run(f"Question {i}?", system=system, max_tokens=6).text for i in (0, 7, 23)}
        results = [ticket.result(timeout_s=300) for ticket in tickets]
        assert [r.status for r in results] == ["finished"] * 24
        for i, text in alone.items():
            assert results[i].text == text
        usages = [r.usage for r in results if r.usage]
        assert sum(u.cached_tokens for u in usages) > sum(u.prefill_tokens for u in usages)

    def test_lru_eviction(self, pipeline: Pipeline) -> None:
        if pipeline.real:
            pytest.skip("fills the cache: only the tiny model's budget is small enough")
        old = unique(20)
        pipeline.run("Hi", system=old, max_tokens=2)
        before = int(pipeline.fresh_metrics()["evicted_nodes"])
        for _ in range(45):
            pipeline.run("Hi", system=unique(20), max_tokens=2)
        after = pipeline.fresh_metrics()
        assert int(after["evicted_nodes"]) > before
        assert int(after["cache_bytes"]) <= int(after["cache_bytes_limit"])
        again = pipeline.run("Hi", system=old, max_tokens=2).usage
        assert again is not None
        assert again.cached_tokens < 0.5 * again.prompt_tokens

    def test_a_job_that_fails_takes_nothing_with_it(self, pipeline: Pipeline) -> None:
        good = pipeline.submit("Fine.", max_tokens=4)
        bad = pipeline.submit(unique(20_000), max_tokens=4)
        with pytest.raises(GenerationFailed) as caught:
            bad.result(timeout_s=300)
        assert caught.value.code == "context_length_exceeded"
        assert good.result(timeout_s=300).status == "finished"

    def test_multimodal_request(self, seeing: Pipeline) -> None:
        """A picture and a text go in; the same picture is stored, seen and computed once, another one apart."""
        noise = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), np.uint8)
        first, other = (Image.fromarray(pixels) for pixels in noise)
        before = seeing.fresh_metrics()
        one = seeing.run("What is this?", images=[first], max_tokens=8)
        again = seeing.run("What is this, again?", images=[first], max_tokens=8)
        apart = seeing.run("What is this?", images=[other], max_tokens=8)
        words = seeing.run("What is this?", max_tokens=8)
        assert {result.status for result in (one, again, apart, words)} == {"finished"}
        assert len({one.text, apart.text, words.text}) == 3
        assert one.usage is not None
        assert again.usage is not None
        assert apart.usage is not None
        assert again.usage.cached_tokens > 35, "the picture's 40 tokens or so were there"
        assert apart.usage.cached_tokens < 10, "no more than the words before the picture"
        metrics = seeing.fresh_metrics()
        assert int(metrics["vision_runs"]) - int(before["vision_runs"]) == 2
        assert int(metrics["vision_bytes"]) > 0

    def test_a_herd_of_questions_on_one_picture(self, seeing: Pipeline) -> None:
        """64 questions on a cold picture: it is seen once and prefilled once, and pinned no longer than needed."""
        noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
        before = seeing.fresh_metrics()
        tickets = [seeing.submit(f"{i:02d}?", images=[noise], max_tokens=3) for i in range(64)]
        usages = [ticket.result(timeout_s=300).usage for ticket in tickets]
        after = seeing.fresh_metrics()
        assert int(after["vision_runs"]) - int(before["vision_runs"]) == 1
        computed = int(after["computed_tokens"]) - int(before["computed_tokens"])
        assert computed <= max(u.prompt_tokens for u in usages if u) + 64 * 16
        assert after["pinned_bytes"] == "0"

    def test_a_picture_that_a_model_cannot_take_fails_alone(self, seeing: Pipeline, pipeline: Pipeline) -> None:
        strip = Image.new("RGB", (3000, 4))
        bad = seeing.submit("What is this?", images=[strip], max_tokens=4)
        good = seeing.submit("And who are you?", max_tokens=4)
        blind = pipeline.submit("What is this?", images=[Image.new("RGB", (30, 30))], max_tokens=4)
        beside = pipeline.submit("And who are you?", max_tokens=4)
        for ticket, why in (
            (bad, "one side 750 times the other; send it in another shape"),
            (blind, r"radixq\[vision\]"),
        ):
            with pytest.raises(GenerationFailed, match=why) as caught:
                ticket.result(timeout_s=300)
            assert caught.value.code == "unsupported"
        assert {ticket.result(timeout_s=300).status for ticket in (good, beside)} == {"finished"}


class TestRadixTreeBehavior:
    """What the tree finds."""

    def test_prefix_match(self, pipeline: Pipeline) -> None:
        """The longest common prefix is found, wherever the prompts part."""
        base = unique(15).split()
        whole = pipeline.run(" ".join(base), max_tokens=1).usage
        assert whole is not None
        hits = []
        for kept in (3, 8, 13):
            usage = pipeline.run(" ".join([*base[:kept], *unique(15 - kept).split()]), max_tokens=1).usage
            assert usage is not None
            hits.append(usage.cached_tokens)
        assert hits == sorted(hits)
        assert hits[0] < hits[1] < hits[2] < whole.prompt_tokens

    def test_the_same_prompt_again_computes_one_token(self, pipeline: Pipeline) -> None:
        text = unique(10)
        first = pipeline.run("ignored", system=text, max_tokens=4)
        again = pipeline.run("ignored", system=text, max_tokens=4)
        assert again.usage is not None
        assert again.usage.prefill_tokens == 1, "all but the prompt's last token was there"
        assert again.text == first.text

    def test_thundering_herd(self, pipeline: Pipeline) -> None:
        """64 jobs with one cold prefix, at once and one by one, from two queues: it is computed once."""
        before = int(pipeline.fresh_metrics()["computed_tokens"])
        system = unique(50)
        tickets = []
        for i in range(64):
            queue = {} if i % 2 or pipeline.real else {"model": "tiny"}
            tickets.append(pipeline.submit(f"{i:02d}?", system=system, max_tokens=3, **queue))
            if i > 40:
                time.sleep(0.01)
        usages = [ticket.result(timeout_s=300).usage for ticket in tickets]
        computed = int(pipeline.fresh_metrics()["computed_tokens"]) - before
        longest = max(u.prompt_tokens for u in usages if u)
        assert computed <= longest + 64 * 16, "the prefix once, and each job's own question"
        assert sum(u.prefill_tokens > longest / 2 for u in usages if u) == 1

    def test_poisoned_node_retry(self, pipeline: Pipeline) -> None:
        """Jobs behind a prefix that cannot be computed fail with a reason, each alone; others do not notice."""
        if pipeline.real:
            pytest.skip("only the tiny model has a token that breaks it")
        systems = [f"{unique(8)} {mark} {unique(4)}" for mark in (POISON, "fine")]
        expected = pipeline.run("0?", system=systems[1], max_tokens=5).text
        tickets = [pipeline.submit(f"{i // 2}?", system=systems[i % 2], max_tokens=5) for i in range(12)]
        for ticket in tickets[::2]:
            with pytest.raises(GenerationFailed) as caught:
                ticket.result(timeout_s=300)
            assert caught.value.code == "internal"
        assert [ticket.result(timeout_s=300).status for ticket in tickets[1::2]] == ["finished"] * 6
        assert tickets[1].result().text == expected
        assert pipeline.fresh_metrics()["pinned_bytes"] == "0"


class TestMemoryManagement:
    """What is held, and given back."""

    def test_nothing_stays_pinned_when_nothing_runs(self, pipeline: Pipeline) -> None:
        for i in range(4):
            pipeline.run(f"Pin {i}", system=unique(5), max_tokens=3)
        metrics = pipeline.fresh_metrics()
        assert metrics["pinned_bytes"] == "0"
        assert metrics["batch_rows"] == "0"
        assert int(metrics["cache_bytes"]) > 0

    def test_unpin_and_evict(self, pipeline: Pipeline) -> None:
        """What a finished job held can go, and goes, when others need the room; they all finish."""
        if pipeline.real:
            pytest.skip("fills the cache: only the tiny model's budget is small enough")
        tickets = [pipeline.submit("Hi", system=unique(100), max_tokens=3) for _ in range(20)]
        assert {ticket.result(timeout_s=300).status for ticket in tickets} == {"finished"}
        metrics = pipeline.fresh_metrics()
        assert int(metrics["evicted_bytes"]) > 0
        assert int(metrics["cache_bytes"]) <= KV_BYTES
        assert metrics["pinned_bytes"] == "0"

    def test_cascading_cleanup(self, pipeline: Pipeline) -> None:
        """Branches of a prefix that nobody uses go, and the prefix with them."""
        if pipeline.real:
            pytest.skip("fills the cache: only the tiny model's budget is small enough")
        system = unique(20)
        for i in range(3):
            pipeline.run(f"Branch {i}", system=system, max_tokens=2)
        for _ in range(25):
            pipeline.run("Hi", system=unique(40), max_tokens=2)
        again = pipeline.run("Branch 0", system=system, max_tokens=2).usage
        assert again is not None
        assert again.cached_tokens < 0.3 * again.prompt_tokens
