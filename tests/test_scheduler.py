"""Steps are full but bounded, and nobody waits for ever: the scheduler's rules, one by one."""

from __future__ import annotations

from functools import partial

import pytest

from dape_engine.cache import CacheInvariantError, NoFreeBlocksError
from dape_engine.errors import ContextLengthError, QueueFullError, RequestError, SettingsError
from dape_engine.fairness import MAX_IDLE_TENANTS, FairShares
from dape_engine.request import SamplingParams
from dape_engine.sequence import Sequence
from simulated_engine import SimulatedEngine, counts, text


def test_one_request_is_prefilled_in_chunks_and_then_decoded() -> None:
    engine = SimulatedEngine(20)
    request = engine.generate(text(37), max_tokens=3)
    steps = engine.run()
    assert [counts(step, request)[0] for step in steps] == [16, 16, 5, 1, 1]


def test_the_last_token_of_a_scored_text_is_never_read() -> None:
    engine = SimulatedEngine(20)
    request = engine.score(text(17), score_from=5)
    assert [counts(step, request)[0] for step in engine.run()] == [16]
    assert [entry.token_id for entry in request.scored] == text(17)[5:]


def test_decoding_sequences_come_first_and_never_wait_for_a_long_prompt() -> None:
    engine = SimulatedEngine(100)
    talkers = [engine.generate(text(2, seed), max_tokens=20) for seed in range(3)]
    engine.step()
    long = engine.generate(text(64, 9))
    for _ in range(4):
        assert counts(engine.step(), *talkers, long) == [1, 1, 1, 13]


def test_a_short_prompt_passes_a_long_one_which_still_goes_on() -> None:
    engine = SimulatedEngine(200)
    long = engine.generate(text(400, 1))
    engine.step()
    short = engine.generate(text(9, 2))
    assert counts(engine.step(), long, short) == [7, 9]
    assert short not in engine.unfinished


def test_a_long_prompt_keeps_its_share_in_an_endless_stream_of_short_ones() -> None:
    engine = SimulatedEngine(300)
    long = engine.generate(text(400, 1))
    for seed in range(2, 102):
        engine.generate(text(16, seed))
        engine.step()
    assert long not in engine.unfinished


def test_equal_prompts_are_finished_one_by_one_rather_than_all_at_the_end() -> None:
    engine = SimulatedEngine(200)
    requests = [engine.generate(text(32, seed)) for seed in range(4)]
    done = []
    while engine.unfinished:
        engine.step()
        done.append(sum(request not in engine.unfinished for request in requests))
    assert done == [0, 1, 1, 2, 2, 3, 3, 4]


def test_late_chunks_shrink_while_someone_decodes_so_that_a_step_stays_short() -> None:
    engine = SimulatedEngine(200, max_num_batched_tokens=64, max_prefill_pairs=1600)
    talker = engine.generate(text(2), max_tokens=200)
    engine.step()
    long = engine.generate(text(500, 1))
    sizes = [counts(engine.step(), long)[0] for _ in range(60)]
    assert sizes[0] == 56, "56 * 57 / 2 = 1596 pairs"
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 4, "one block"
    engine.abort(talker)
    assert counts(engine.step(), long) == [64]


def test_a_short_prompt_passes_a_long_one_also_while_someone_decodes() -> None:
    engine = SimulatedEngine(200, max_num_batched_tokens=64, max_prefill_pairs=1600)
    engine.generate(text(2), max_tokens=200)
    long = engine.generate(text(500, 1))
    for _ in range(5):
        engine.step()
    short = engine.generate(text(20, 2))
    assert long.num_computed > 100
    assert counts(engine.step(), short) == [20]


def test_chunks_are_as_large_as_the_budget_where_nobody_decodes() -> None:
    engine = SimulatedEngine(60, max_prefill_pairs=1)
    ending, long = engine.score(text(18, 1)), engine.score(text(40, 2))
    assert counts(engine.step(), ending, long) == [16, 0]
    assert counts(engine.step(), ending, long) == [1, 15]


def test_one_block_of_rows_is_granted_however_small_the_bound_on_pairs() -> None:
    engine = SimulatedEngine(50, max_prefill_pairs=1)
    engine.generate(text(2), max_tokens=30)
    engine.step()
    long, other = engine.generate(text(60, 1)), engine.generate(text(8, 2))
    assert counts(engine.step(), long, other) == [4, 0]
    engine.run()


def test_a_common_prefix_is_computed_once() -> None:
    engine = SimulatedEngine(30)
    first = engine.generate(text(11))
    engine.step()
    second = engine.generate([*text(11)[:9], 8, 8])
    step = engine.step()
    assert step.prefix_queries == 11
    assert step.prefix_hits == second.num_cached == 8
    assert counts(step, second) == [3]
    assert first.num_cached == 0


def test_a_whole_cached_prompt_still_computes_the_row_that_gives_the_next_token() -> None:
    engine = SimulatedEngine(30)
    engine.generate(text(8))
    engine.run()
    again = engine.generate(text(8))
    assert counts(engine.step(), again) == [4]
    assert again.num_cached == 4


def test_scored_rows_are_computed_even_where_the_prefix_is_known() -> None:
    engine = SimulatedEngine(30)
    engine.generate(text(16))
    engine.run()
    request = engine.score(text(16), score_from=10)
    engine.run()
    assert request.num_cached == 8


def test_completions_of_one_prompt_that_arrive_together_share_its_blocks() -> None:
    engine = SimulatedEngine(40, max_num_batched_tokens=64)
    requests = [engine.generate(text(33), max_tokens=2) for _ in range(4)]
    steps = engine.run()
    assert sum(chunk.count for step in steps for chunk in step.chunks) == 33 + 3 * 1 + 4
    assert [request.num_cached for request in requests] == [0, 32, 32, 32]
    assert sum(step.prefix_queries for step in steps) == 4 * 33
    assert sum(step.prefix_hits for step in steps) == 3 * 32


def test_a_prefix_is_not_continued_from_the_middle_of_an_own_block() -> None:
    engine = SimulatedEngine(40, max_num_batched_tokens=20)
    request, scored = engine.generate(text(40)), engine.score(text(40), priority=0)
    assert counts(engine.step(), request, scored) == [5, 15]
    engine.step()
    assert request.num_cached == 0
    engine.run()


def test_when_blocks_run_out_the_last_admitted_starts_again_and_all_answers_are_right() -> None:
    engine = SimulatedEngine(6)
    first, second = (engine.generate(text(4, seed), max_tokens=17) for seed in (1, 2))
    steps = engine.run()
    assert [step.preempted for step in steps if step.preempted] == [[second]]
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert second.num_cached > 0, "its own first blocks were still there"
    assert sum(step.prefix_queries for step in steps) == 8
    assert sum(step.prefix_hits for step in steps) == 0


def test_a_preempted_sequence_goes_before_all_that_wait_whatever_their_priority() -> None:
    engine = SimulatedEngine(6)
    engine.generate(text(4, 1), max_tokens=17)
    victim = engine.generate(text(4, 2), max_tokens=17, priority=5)
    while not victim.num_preemptions:
        engine.step()
    newcomer = engine.generate(text(4, 3), priority=-1)
    assert engine.scheduler.waiting == [victim, newcomer]
    while newcomer in engine.scheduler.waiting:
        engine.step()
    assert victim not in engine.scheduler.waiting
    engine.run()


def test_a_preempted_sequence_can_be_aborted_while_it_waits() -> None:
    engine = SimulatedEngine(6)
    engine.generate(text(4, 1), max_tokens=17)
    victim = engine.generate(text(4, 2), max_tokens=17)
    while not victim.num_preemptions:
        engine.step()
    engine.abort(victim)
    assert engine.scheduler.waiting == []
    engine.run()


def test_admission_leaves_room_for_the_running_to_grow() -> None:
    engine = SimulatedEngine(4)
    engine.generate(text(7, 1), max_tokens=2)
    engine.step()
    waiter = engine.generate(text(7, 2))
    engine.step()
    assert waiter in engine.scheduler.waiting
    engine.run()
    assert waiter.num_preemptions == 0


def test_admission_counts_the_blocks_that_running_prompts_still_need() -> None:
    engine = SimulatedEngine(10)
    engine.generate(text(24, 1))
    engine.step()
    waiter = engine.generate(text(20, 2))
    step = engine.step()
    assert waiter in engine.scheduler.waiting
    assert not step.preempted
    engine.run()


def test_background_chunks_get_a_share_and_what_the_others_leave() -> None:
    engine = SimulatedEngine(100)
    background = engine.score(text(40, 1))
    engine.step()
    request = engine.generate(text(64, 2))
    assert counts(engine.step(), background, request) == [4, 12]


def test_background_work_comes_after_the_rest_but_not_never() -> None:
    engine = SimulatedEngine(100, max_num_seqs=1)
    engine.generate(text(3, 0))
    background = engine.score(text(5, 1))
    order = []
    for seed in range(2, 10):
        order += [chunk.sequence for chunk in engine.step().chunks]
        engine.generate(text(3, seed))
    assert order.index(background) == 4


def test_background_work_takes_only_the_slots_it_can_use() -> None:
    engine = SimulatedEngine(300, max_num_seqs=4)
    texts = [engine.score(text(200, seed)) for seed in range(3)]
    engine.step()
    assert list(engine.scheduler.running) == texts[:1]
    request = engine.generate(text(8, 9))
    assert counts(engine.step(), request) == [8]
    short = SimulatedEngine(300, max_num_seqs=4)
    texts = [short.score(text(5, seed)) for seed in range(4)]
    assert counts(short.step(), *texts) == [4, 4, 4, 4]


def test_a_full_queue_refuses_with_the_limit_unless_the_request_was_accepted_before() -> None:
    engine = SimulatedEngine(10, max_num_queued_reqs=2)
    for seed in range(2):
        engine.generate(text(3, seed))
    with pytest.raises(QueueFullError, match=r"2 requests wait.*max_num_queued_reqs.* is 2") as caught:
        engine.generate(text(3, 5))
    assert caught.value.retry_after >= 1
    part = Sequence("part", text(3, 6), score_from=1)
    engine.scheduler.add(part, accepted=True)
    assert part in engine.scheduler.waiting


@pytest.mark.parametrize("max_tokens", [9, 10])
def test_what_could_never_fit_is_refused_and_what_just_fits_runs(max_tokens: int) -> None:
    engine = SimulatedEngine(4, 3)
    if max_tokens == 10:
        with pytest.raises(ContextLengthError, match="room for 13 tokens, the whole cache has 12"):
            engine.generate(text(4), max_tokens=max_tokens)
        return
    engine.generate(text(4), max_tokens=max_tokens)
    engine.run()


@pytest.mark.parametrize("tokens", [[], [1]])
def test_a_text_without_a_row_is_refused(tokens: list[int]) -> None:
    with pytest.raises(RequestError, match="nothing to compute"):
        SimulatedEngine(4).score(tokens)


def test_a_step_must_have_room_for_a_row_of_every_sequence() -> None:
    with pytest.raises(SettingsError, match="max_num_batched_tokens 3 is below max_num_seqs 4"):
        SimulatedEngine(4, max_num_batched_tokens=3)


def test_growth_past_the_promised_length_is_an_error_not_a_silent_stop() -> None:
    engine = SimulatedEngine(1, 2)
    request = engine.generate([1], max_tokens=2)
    engine.step()
    request.tokens += [1, 1]
    with pytest.raises(NoFreeBlocksError):
        engine.step()


def test_a_request_can_be_aborted_at_every_point_and_again_when_it_is_gone() -> None:
    for point in range(6):
        engine = SimulatedEngine(12)
        other = engine.generate(text(9, 1), max_tokens=8)
        request = engine.generate(text(30, 2), max_tokens=4)
        for _ in range(point // 2):
            engine.step()
        if point % 2:
            engine.abort(request)
        else:
            engine.step(during=partial(engine.abort, request))
        assert request not in engine.scheduler.running
        engine.scheduler.finish(request)
        engine.run()
        assert other.num_generated == 8


def test_blocks_of_a_failed_step_are_not_found_again() -> None:
    engine = SimulatedEngine(20)
    request = engine.generate(text(16))
    step = engine.scheduler.schedule()
    for chunk in step.chunks:
        engine.abort(chunk.sequence)
    assert engine.pool.num_cached == 0
    again = engine.generate(request.tokens)
    engine.run()
    assert again.num_cached == 0


def test_the_checker_names_a_sequence_whose_blocks_are_wrong() -> None:
    engine = SimulatedEngine(9)
    request = engine.generate(text(30), max_tokens=2)
    engine.step()
    request.num_computed += 1
    with pytest.raises(CacheInvariantError, match="sequence 'g' has 17 tokens"):
        engine.scheduler.check_invariants()
    request.num_computed -= 1
    waiter = engine.generate(text(20, 1))
    waiter.num_computed = 1
    with pytest.raises(CacheInvariantError, match="waits but holds"):
        engine.scheduler.check_invariants()


class TestTenants:
    def test_a_newcomer_is_admitted_before_the_rest_of_a_crowd(self) -> None:
        engine = SimulatedEngine(200, max_num_seqs=2)
        crowd = [engine.generate(text(8, seed), max_tokens=4, tenant="greedy") for seed in range(6)]
        engine.step()
        engine.step()
        chat = engine.generate(text(8, 9), max_tokens=4, tenant="chat")
        assert chat in [chunk.sequence for chunk in engine.step().chunks]
        engine.run()
        assert all(sequence.num_generated == 4 for sequence in [*crowd, chat])

    def test_the_latest_of_the_greediest_makes_way_and_keeps_its_prefix(self) -> None:
        engine = SimulatedEngine(200, max_num_seqs=3)
        crowd = [engine.generate(text(8, seed), max_tokens=30, tenant="greedy") for seed in range(4)]
        for _ in range(4):
            engine.step()
        chat = engine.generate(text(8, 9), max_tokens=2, tenant="chat")
        assert engine.step().yielded == [crowd[2]]
        assert engine.scheduler.waiting == [crowd[2], crowd[3]]
        engine.step()
        assert chat not in engine.unfinished
        engine.step()
        assert crowd[2].num_cached >= 8
        engine.run()

    def test_nobody_makes_way_for_a_tenant_that_runs_already_or_for_background_work(self) -> None:
        engine = SimulatedEngine(200, max_num_seqs=3)
        for seed, tenant in enumerate(["greedy", "greedy", "chat"]):
            engine.generate(text(8, seed), max_tokens=30, tenant=tenant)
        engine.step()
        engine.step()
        engine.generate(text(8, 7), tenant="chat")
        engine.score(text(8, 8), tenant="scorer")
        assert engine.step().yielded == []

    def test_tenants_get_the_same_rows_however_many_requests_they_have(self) -> None:
        engine = SimulatedEngine(2000, max_num_seqs=16)
        crowd = [engine.score(text(60, seed), tenant="greedy") for seed in range(100, 112)]
        other = [engine.score(text(60, seed), tenant="modest") for seed in range(2)]
        rows = dict.fromkeys(["greedy", "modest"], 0)
        while any(sequence in engine.unfinished for sequence in other):
            for chunk in engine.step().chunks:
                rows[chunk.sequence.tenant] += chunk.count
        assert any(sequence in engine.unfinished for sequence in crowd)
        # The crowd was there first and keeps the share of the first admitted.
        assert rows["greedy"] <= 2 * rows["modest"]

    def test_priority_ranks_the_requests_of_one_tenant_and_not_the_tenants(self) -> None:
        engine = SimulatedEngine(200, max_num_seqs=1)
        engine.generate(text(4, 1), max_tokens=3, tenant="a")
        engine.step()
        late = engine.generate(text(4, 2), tenant="a", priority=0)
        early = engine.generate(text(4, 3), tenant="a", priority=-9)
        other = engine.generate(text(4, 4), tenant="b")
        order = [chunk.sequence for step in engine.run() for chunk in step.chunks if chunk.start == 0]
        assert order == [other, early, late]

    def test_a_full_queue_still_hears_a_tenant_of_whom_nothing_waits(self) -> None:
        engine = SimulatedEngine(200, max_num_seqs=1, max_num_queued_reqs=8)
        for seed in range(8):
            engine.generate(text(8, seed), tenant="greedy")
        with pytest.raises(QueueFullError):
            engine.generate(text(8, 20), tenant="greedy")
        for tenant in ("b", "c"):
            engine.generate(text(8, 21), tenant=tenant)
        for tenant in ("b", "d"):
            with pytest.raises(QueueFullError):
                engine.generate(text(8, 22), tenant=tenant)

    def test_a_tenant_that_was_away_is_not_paid_for_it(self) -> None:
        shares = FairShares()
        shares.join("a", [])
        shares.charge("a", 100.0)
        shares.charge("a", 1.0)
        shares.join("b", ["a"])
        assert shares.received("b") == 100.0
        shares.join("c", [])
        assert shares.received("c") == 0.0

    def test_accounts_of_passing_tenants_do_not_pile_up(self) -> None:
        shares = FairShares()
        shares.join("a", [])
        for number in range(3 * MAX_IDLE_TENANTS):
            shares.join(f"t{number}", ["a"])
            shares.charge(f"t{number}", 1.0)
        assert len(shares._received) <= MAX_IDLE_TENANTS + 3


def test_tokens_that_wait_are_bounded_like_requests() -> None:
    engine = SimulatedEngine(200, max_num_queued_tokens=30)
    engine.generate(text(16), max_tokens=5)
    assert engine.scheduler.waiting_tokens == 20
    with pytest.raises(QueueFullError, match=r"20 tokens wait.*adds 11.*max_num_queued_tokens.* is 30"):
        engine.generate(text(11))
    engine.generate(text(10))
    engine.step()
    assert engine.scheduler.waiting_tokens == 0


def test_one_request_above_the_bound_on_waiting_tokens_is_still_served() -> None:
    engine = SimulatedEngine(200, max_num_queued_tokens=30)
    engine.generate(text(100))
    engine.run()


def test_background_work_has_its_own_bound() -> None:
    engine = SimulatedEngine(500, max_num_batched_tokens=64)
    engine.generate(text(2), max_tokens=200)
    engine.step()
    long = engine.score(text(400, 1))
    assert counts(engine.step(), long) == [63]
    assert counts(engine.step(background_pairs=(640, 1)), long) == [9]
    assert counts(engine.step(background_pairs=(1, 999)), long) == [1], "a quarter of a block"
    assert counts(engine.step(), long) == [63]


class TestScoresKeptWithBlocks:
    def test_a_text_scored_again_computes_its_last_block_only(self) -> None:
        engine = SimulatedEngine(100)
        engine.score(text(40))
        engine.run()
        again = engine.score(text(40))
        engine.run()
        assert engine.rows_scored == 39 + 4
        assert again.num_cached == 32

    def test_answers_after_one_context_score_it_once(self) -> None:
        engine = SimulatedEngine(100)
        for answer in range(4):
            engine.score([*text(33), answer, answer, 5])
            engine.run()
        # The context's blocks hold 32 tokens; its last token is scored with each answer.
        assert engine.rows_scored == 35 + 3 * 4

    def test_generation_leaves_no_scores_and_scoring_does_not_need_them(self) -> None:
        engine = SimulatedEngine(100)
        engine.generate(text(40))
        engine.run()
        scored = engine.score(text(40))
        engine.run()
        assert engine.rows_scored == 39
        assert scored.num_cached == 0

    def test_alternatives_are_computed_where_fewer_are_kept(self) -> None:
        engine = SimulatedEngine(100)
        for top, rows in ((1, 39), (0, 4), (1, 4), (2, 39), (1, 4)):
            before = engine.rows_scored
            engine.score(text(40), top=top)
            engine.run()
            assert engine.rows_scored - before == rows

    def test_scores_leave_with_their_blocks(self) -> None:
        engine = SimulatedEngine(12)
        engine.score(text(40))
        engine.run()
        engine.generate(text(48, 1))
        engine.run()
        engine.score(text(40))
        engine.run()
        assert engine.rows_scored == 2 * 39

    def test_a_later_start_keeps_what_it_has(self) -> None:
        engine = SimulatedEngine(100)
        engine.score(text(40), score_from=18)
        engine.run()
        engine.score(text(40), score_from=10)
        engine.run()
        # Tokens 20 to 35 are known from the first pass, but for those of the chunk that comes upon them.
        second = engine.rows_scored - 22
        assert 10 + 4 <= second < 30
        engine.score(text(40), score_from=12)
        engine.run()
        assert engine.rows_scored == 22 + second + 4


def test_salts_keep_prefixes_apart() -> None:
    engine = SimulatedEngine(100)
    hits = []
    for salt in ("", "a", "a", "b", ""):
        sequence = Sequence("g", text(20), SamplingParams(max_tokens=1), cache_salt=salt)
        engine.add(sequence)
        engine.run()
        hits.append(sequence.num_cached)
    assert hits == [0, 0, 16, 0, 16]


def test_what_a_failed_sequence_left_in_the_cache_is_not_found_again() -> None:
    engine = SimulatedEngine(100)
    failing = engine.generate(text(40))
    engine.step()
    engine.scheduler.discard(failing)
    engine.unfinished.remove(failing)
    engine.scheduler.check_invariants()
    again = engine.generate(text(40))
    engine.run()
    assert again.num_cached == 0
