"""One-line bugs that the simulation must notice. A line that changes is changed here as well."""

from __future__ import annotations

from mutation import Mutant

_ANSWER = "roost_router.answer"
_HTTP = "roost_router.http"
_FLEET = "roost_router.fleet"
_MID = ("broken_mid_stream", "clean_end", "silent_mid_stream", "failing_twice")

MUTANTS = (
    # phases: what a loss leads to
    Mutant(
        f"{_ANSWER}.phases",
        "if self.phase is Phase.STREAMING and self._is_finished():",
        "if False:",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "return Verdict.RESUME if self._may_resume(now) else Verdict.CUT",
        "return Verdict.CUT",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "return Verdict.RESUME if self._may_resume(now) else Verdict.CUT",
        "return Verdict.COMPLETE",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "return Verdict.RESUME if self._may_resume(now) else Verdict.CUT",
        "return Verdict.AGAIN",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "return Verdict.AGAIN if self._may_try(now) else Verdict.FAIL",
        "return Verdict.FAIL",
        ("broken_before_head",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if self.num_attempts >= self._limits.max_attempts or now >= self.deadline:",
        "if now >= self.deadline:",
        ("all_failing",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if self.num_resumes >= self._limits.max_resumes or now >= self.deadline:",
        "if now >= self.deadline:",
        ("all_failing",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "self.budget_is_spent = not self._budget.try_withdraw(now)",
        "self.budget_is_spent = False",
        ("retry_storm",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if self.status in _RETRYABLE and has_others() and self._may_try(now):",
        "if False:",
        ("statuses",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if self.is_done:",
        "if True:",
        ("clean_end",),
        under="rest = self._forward(self.reader.end())",
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "self._seed = seed if is_exact else None",
        "self._seed = None",
        ("failing_twice",),
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "return self._continuation.rewrite(events)",
        "return events",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if self.phase is not Phase.STREAMING:",
        "if True:",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.phases",
        "if asked.num_choices > 1:",
        "if False:",
        ("several_choices",),
    ),
    # events: what of a stream is relayed and noted
    Mutant(
        f"{_ANSWER}.events",
        "emitted.add_ids(ids)",
        "pass",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.events",
        "self._tail = data[end:]",
        "end, self._tail = len(data), b''",
        ("broken_mid_stream", "calm"),
    ),
    Mutant(
        f"{_ANSWER}.events",
        "if emitted.is_understood and not emitted.is_finished:",
        "if False:",
        ("error_event", "clean_end"),
    ),
    Mutant(
        f"{_ANSWER}.events",
        "if chunk.error and bytes(chunk.error) not in _NOTHING:",
        "if False:",
        ("error_event",),
    ),
    Mutant(
        f"{_ANSWER}.events",
        "emitted.finished.add(choice.index)",
        "pass",
        ("calm",),
    ),
    Mutant(
        f"{_ANSWER}.events",
        "if self._reports_ids and block.startswith(COMMENT_PREFIX):",
        "if False:",
        ("calm",),
    ),
    # resume: bodies and events of later legs
    Mutant(
        f"{_ANSWER}.resume",
        "chunk |= self._same",
        "pass",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.resume",
        'delta.pop("role", None)',
        "pass",
        ("foreign_engines",),
    ),
    Mutant(
        f"{_ANSWER}.resume",
        "fields[name] -= emitted.num_tokens",
        "pass",
        ("foreign_engines",),
    ),
    Mutant(
        f"{_ANSWER}.resume",
        'fields |= {"continue_final_message": True, "add_generation_prompt": False}',
        "pass",
        ("foreign_engines",),
    ),
    Mutant(
        f"{_ANSWER}.resume",
        'events.append(b"[DONE]")',
        "pass",
        _MID,
    ),
    Mutant(
        f"{_ANSWER}.resume",
        "usage = usage_object(prompt_tokens, emitted.num_tokens, cached)",
        "usage = usage_object(prompt_tokens, emitted.num_tokens + 1, cached)",
        (*_MID, "killed"),
    ),
    # exchange: the shell
    Mutant(
        f"{_HTTP}.exchange",
        "self._upstream.abandon()",
        "pass",
        ("silent_mid_stream", "silent_before_head"),
        under='"""Release what the present leg holds."""',
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._upstream.abandon()",
        "pass",
        ("leaving",),
        under="self._waiting.cancel()",
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._service.placer.finish(self._placement, self._service.now())",
        "pass",
        ("broken_before_head",),
        under='"""Release what the present leg holds."""',
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "service.placer.finish(placement, now, num_events)",
        "pass",
        ("calm",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._dialling.cancel()",
        "pass",
        ("leaving", "vanished", "chaos"),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._waiting.cancel()",
        "pass",
        ("leaving", "chaos"),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._tried |= {self._placement.replica.name}",
        "pass",
        ("statuses", "broken_before_head", "malformed"),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._body = body",
        "pass",
        _MID,
    ),
    Mutant(
        f"{_HTTP}.head",
        '_RESUMABLE_LINE if is_resumable else b"",',
        'b"",',
        _MID,
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "if upstream is not None and upstream.was_stale:",
        "if False:",
        ("idle_races",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "return now >= self._deadline or self._has_stalled(now)",
        "return self._has_stalled(now)",
        ("deadlines",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "return now >= self._deadline or self._has_stalled(now)",
        "return now >= self._deadline",
        ("silent_before_head", "silent_mid_stream"),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "if self._upstream is None or placement is None or self._is_paused:",
        "if self._upstream is None or placement is None:",
        ("slow_readers",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        'self._write(b"data: " + event + b"\\n\\n")',
        "pass",
        ("all_failing",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._client.abort()",
        'self._client.write(b"0\\r\\n\\r\\n")',
        ("all_failing",),
        under='"""Tell a client that has part of the answer that the rest will not come."""',
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._upstream.pause()",
        "pass",
        ("slow_readers",),
    ),
    Mutant(
        f"{_HTTP}.exchange",
        "self._upstream.resume()",
        "pass",
        ("slow_readers",),
    ),
    # connections
    Mutant(
        f"{_HTTP}.downstream",
        "active.client_gone()",
        "pass",
        ("leaving",),
    ),
    Mutant(
        f"{_HTTP}.downstream",
        "self._active.pause()",
        "pass",
        ("slow_readers",),
    ),
    Mutant(
        f"{_HTTP}.downstream",
        "if self._active is None and not self._waiting and not self._is_paused:",
        "if True:",
        ("calm",),
    ),
    Mutant(
        f"{_HTTP}.upstream",
        "if exc is None and self._has_head and not self._has_length:",
        "if exc is None and self._has_head:",
        ("broken_mid_stream",),
    ),
    Mutant(
        f"{_HTTP}.upstream",
        "return self.num_requests > 1 and not self._has_begun",
        "return self.num_requests > 1",
        ("all_failing", "failing_twice"),
    ),
    Mutant(
        f"{_HTTP}.service",
        "elif now - since >= _QUIET_S:",
        "else:",
        ("draining",),
    ),
    Mutant(
        f"{_HTTP}.service",
        "exchange.stop()",
        "pass",
        ("draining",),
    ),
    Mutant(
        f"{_HTTP}.upstream",
        "keep = self._may_keep and not self._has_excess",
        "keep = self._may_keep",
        ("harmless",),
    ),
    Mutant(
        f"{_HTTP}.upstream",
        "if status < 200 or self._has_head:  # 1xx: interim, the real head follows",
        "if self._has_head:",
        ("harmless",),
    ),
    Mutant(
        f"{_HTTP}.service",
        "self._settle(self._exchanges.pop(exchange, None), record)",
        "pass",
        ("calm",),
    ),
    Mutant(
        f"{_HTTP}.service",
        "self._sweep.cancel()",
        "pass",
        ("calm",),
    ),
    Mutant(
        f"{_HTTP}.service",
        "pool.close()",
        "pass",
        ("calm",),
    ),
    # the fleet
    Mutant(
        "roost_router.placement",
        "if placement.is_finished:",
        "if False:",
        ("broken_before_head", "several_choices"),
        under="`num_events`: events of a stream that went at the replica's own pace, else 0.",
    ),
    Mutant(
        f"{_FLEET}.replica",
        "self.queued_tokens -= uncached_tokens",
        "pass",
        ("broken_before_head",),
        under="def release(self, uncached_tokens: int, prompt_tokens: int, *, "
        "decoding: bool) -> None:",
    ),
    Mutant(
        f"{_FLEET}.fleet",
        "found = taking or fresh or up",
        "found = up",
        ("statuses", "broken_before_head"),
    ),
    Mutant(
        f"{_FLEET}.fleet",
        "found = taking or fresh or up",
        "found = taking",
        ("all_failing", "flapping", "failing_twice"),
    ),
    Mutant(
        f"{_FLEET}.fleet",
        "replica.health.failed(now, stalled=stalled)",
        "pass",
        ("ejected",),
    ),
    Mutant(
        f"{_FLEET}.health",
        "return circuit is Circuit.PROBING and not is_probed",
        "return False",
        ("back_again",),
    ),
    Mutant(
        f"{_FLEET}.retry_budget",
        "self._reserve = max(0.0, self._reserve - (1.0 - from_share))",
        "pass",
        ("retry_storm",),
    ),
    Mutant(
        f"{_FLEET}.watch",
        "return silent_s >= PATIENCE * limit_s or not others_progress",
        "return False",
        ("silent_before_head",),
    ),
    # fleet: replicas that come and go
    Mutant(
        f"{_FLEET}.fleet",
        "if replica.membership is not Membership.LEAVING or replica.num_in_flight:",
        "if replica.membership is not Membership.LEAVING:",
        ("coming_and_going",),
    ),
    Mutant(
        f"{_FLEET}.replica",
        "return self.state is ReplicaState.UP and self.membership is Membership.MEMBER",
        "return self.state is ReplicaState.UP",
        ("coming_and_going",),
    ),
    Mutant(
        "roost_router.placement",
        "self.fleet.released(replica)",
        "pass",
        ("scaled_down",),
    ),
    Mutant(
        f"{_HTTP}.service",
        "self._pools.pop(replica.name).close()",
        "pass",
        ("scaled_down",),
    ),
)
