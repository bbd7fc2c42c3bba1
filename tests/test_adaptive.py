"""起草几个：接受率、用时的估计，选出的个数收敛到最划算的，不划算就不起草。"""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest

from deepseek_opt.generation.adaptive import MAX_DRAFTS, Acceptance, DraftLength, Times


def accepted(rates, drafts, rng):
    """按各深度的接受率抽一行接受的个数。"""
    count = 0
    while count < drafts and rng.random() < rates[count]:
        count += 1
    return count


def simulate(chooser, rows, cost, rates, steps, seed=0):
    """走 steps 步：(总用时, 总词元数, 选过的各步)。"""
    rng, seconds, tokens, chosen = random.Random(seed), 0.0, 0, []
    for _ in range(steps):
        drafts = chooser.choose(rows)
        took = cost(drafts) * (1 + 0.05 * rng.random())
        counts = [accepted(rates, drafts, rng) for _ in range(rows)]
        chooser.record(rows, drafts, took, counts)
        seconds, tokens = seconds + took, tokens + rows + sum(counts)
        chosen.append(drafts)
    return seconds, tokens, chosen


def test_acceptance_is_conditional_and_forgets():
    found = Acceptance()
    assert found.rate(0) == 0.5 == found.rate(3)
    found.add(3, [3, 1, 0, 1] * 5)
    assert found.rate(0) == pytest.approx(0.75, abs=0.02)
    assert found.rate(1) == pytest.approx(1 / 3, abs=0.05)
    assert found.rate(5) == found.rate(2)  # 没有读数的同前一个
    assert found.expected(2) == pytest.approx(1 + 0.75 + 0.25, abs=0.06)
    for _ in range(200):
        found.add(1, [0] * 8)
    assert found.rate(0) < 0.01


def test_times_interpolate_between_known_lengths():
    times = Times()
    for seconds in (1.0, 9.0, 1.0):
        times.add(0, seconds)
    assert times.estimate(0) == times.estimate(5) == 1.0  # 中位数；只有一个就都是它
    times.add(4, 3.0)
    assert times.estimate(2) == pytest.approx(2.0)
    assert times.estimate(8) == pytest.approx(5.0)
    times.add(2, 9.0)
    assert times.estimate(1) == pytest.approx(5.0)


GOOD = [0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    "slope, rates",
    [(0.02, GOOD), (0.15, GOOD), (0.4, GOOD), (0.15, [0.6, 0.3] + [0.1] * 6), (1.5, GOOD)],
)
def test_converges_to_the_best_length(slope, rates):
    def cost(drafts):
        return 1 + slope * drafts + (0.1 if drafts else 0)

    def speed(drafts):
        total, product = 1.0, 1.0
        for rate in rates[:drafts]:
            product *= rate
            total += product
        return total / cost(drafts)

    chooser = DraftLength()
    seconds, tokens, _ = simulate(chooser, 8, cost, rates, 600)
    best = max(speed(d) for d in range(MAX_DRAFTS + 1)) * 8
    assert tokens / seconds > 0.9 * best


def test_a_fixed_cost_of_drafting_does_not_hide_the_gain():
    """1 个就要两倍的用时、4 个却不到三倍：只由 0 与 1 外推会以为永远不合算。开头运气差的个别几次除外。"""

    def cost(drafts):
        return 1 + (0.75 + 0.3 * drafts if drafts else 0)

    runs = [simulate(DraftLength(), 1, cost, [0.9] * 8, 300, seed) for seed in range(10)]
    assert sum(tokens for _, tokens, _ in runs) / sum(seconds for seconds, *_ in runs) > 1.15
    assert sum(chosen[100:].count(0) < 20 for *_, chosen in runs) >= 7


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("slope", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_not_much_slower_than_plain_when_it_does_not_pay(slope, rate, rows):
    """起草再贵，头 500 步连同探索与重量也只多花 3 %。"""

    def cost(drafts):
        return 1 + slope * drafts

    for seed in range(3):
        seconds, tokens, chosen = simulate(DraftLength(), rows, cost, [rate] * 8, 500, seed)
        plain = tokens / rows * 1.025  # 逐个词元生成同样多的用时
        assert seconds < 1.03 * plain
        if slope > 0.25:  # 0.25 时接受率 0.2 只差一点，偶尔起草也不亏
            assert chosen[100:].count(0) > 0.95 * len(chosen[100:])


def test_nothing_is_tried_where_it_could_not_be_timed():
    """只剩几个词元、又要先补提示的短续写：补的那一步不计时，不能因此次次都去试。"""
    chooser = DraftLength()
    for _ in range(20):
        assert chooser.choose(1, remaining=3, pending=50) == 0
        chooser.record(1, 0, 1.0, [0])
    assert chooser.choose(1, remaining=20, pending=50) == 1
    chooser.record(1, 1, None, [1])
    assert chooser.choose(1, remaining=18, pending=1) == 1  # 还没有它的用时
    chooser.record(1, 1, 1.1, [1])
    for _ in range(30):
        chooser.record(1, 1, 1.1, [1])
    assert chooser.choose(1, remaining=18) > 1


def test_batches_of_other_sizes_learn_for_themselves():
    chooser = DraftLength()
    simulate(chooser, 1, lambda d: 1 + 0.01 * d, GOOD, 100)
    simulate(chooser, 32, lambda d: 1 + 1.0 * d, GOOD, 100)
    small = simulate(chooser, 1, lambda d: 1 + 0.01 * d, GOOD, 50)[2]
    large = simulate(chooser, 32, lambda d: 1 + 1.0 * d, GOOD, 50)[2]
    assert sorted(small)[25] >= 4 and sorted(large)[25] == 0


def test_limits():
    assert {DraftLength(3, fixed=True).choose(n) for n in (1, 5, 40)} == {3}
    chooser = DraftLength(2)
    assert set(simulate(chooser, 4, lambda d: 1.0, GOOD, 200)[2]) <= {0, 1, 2}
    assert simulate(chooser, 4, lambda d: 1.0, GOOD, 50)[2].count(2) > 45


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_afresh(copied):
    chooser = DraftLength(5, fixed=True)
    again = copied(chooser)
    assert (again.longest, again.fixed) == (5, True)


def test_threads():
    chooser, errors = DraftLength(), []

    def work(seed):
        try:
            simulate(chooser, 1 + seed, lambda d: 1 + 0.1 * d, GOOD, 300, seed)
        except Exception as error:  # pylint: disable=broad-exception-caught
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
