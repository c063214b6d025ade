"""What runs and what the store says -> protos. Pure: no I/O, no waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loriner.adapters.records import OTHER_BASE, QUARANTINED, READY
from loriner.api import grpc_tools
from loriner.api.adapters import Placed
from loriner.api.formats import Gathered
from loriner.api.running import Run
from loriner.api.spoken import delta_of, message_of
from loriner.api.voice import Said
from loriner.core import TokenLogprob
from loriner_proto.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord, PublishReport
    from loriner.engine.service import Service

_FINISH = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}
_STATES = {
    READY: adapters_pb2.ADAPTER_STATE_READY,
    QUARANTINED: adapters_pb2.ADAPTER_STATE_QUARANTINED,
    OTHER_BASE: adapters_pb2.ADAPTER_STATE_OTHER_BASE,
}
_TIERS = {
    "disk": adapters_pb2.TIER_DISK,
    "host": adapters_pb2.TIER_HOST,
    "gpu": adapters_pb2.TIER_GPU,
}


def opening(run: Run, service: Service) -> inference_pb2.Opening:
    record = run.record
    return inference_pb2.Opening(
        answer_id=run.answer_id,
        model=run.model,
        adapter=None if record is None else record.name,
        generation=run.generation,
        base_digest=service.base_digest,
        cold_start=run.cold_start,
        num_prompt_tokens=run.prompt_tokens,
        prompt_logprobs=[_logprob(entry) for entry in run.prompt_logprobs[1:]],
    )


def delta(said: Said) -> inference_pb2.Delta:
    event, adds = said.event, delta_of(said.pieces)
    return inference_pb2.Delta(
        index=said.index,
        text=adds.content or "",
        reasoning=adds.reasoning or "",
        tool_calls=[grpc_tools.call_delta(made) for made in adds.tool_calls or ()],
        token_ids=event.token_ids,
        logprobs=[_logprob(entry) for entry in event.logprobs],
        finish_reason=_finish(said.finish_reason),
        stop_reason=_stop(event.stop_reason),
    )


def choice(index: int, gathered: Gathered) -> inference_pb2.Choice:
    message = message_of(gathered.pieces)
    return inference_pb2.Choice(
        index=index,
        text=message.content or "",
        reasoning=message.reasoning or "",
        tool_calls=[grpc_tools.call(made) for made in message.tool_calls or ()],
        token_ids=gathered.token_ids,
        logprobs=[_logprob(entry) for entry in gathered.logprobs],
        finish_reason=_finish(gathered.finish_reason),
        stop_reason=_stop(gathered.stop_reason),
    )


def usage(run: Run) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=run.prompt_tokens,
        completion_tokens=run.output_tokens,
        cached_tokens=run.cached_tokens,
        reasoning_tokens=run.reasoning_tokens,
    )


def adapter(placed: Placed) -> adapters_pb2.Adapter:
    entry = record(placed.record)
    entry.tier = _TIERS.get(placed.tier, adapters_pb2.TIER_UNSPECIFIED)
    entry.num_running, entry.num_waiting = placed.num_running, placed.num_waiting
    return entry


def record(found: AdapterRecord) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=found.name,
        short_name=found.short_name,
        generation=found.generation,
        ranks=found.ranks,
        targets=found.targets,
        num_bytes=found.num_bytes,
        pinned=found.pinned,
        created_at=found.created_at,
        alias_of=found.alias_of,
        base_digest=found.base_digest,
        source=found.source,
        has_template=found.has_template,
        state=_STATES.get(found.state, adapters_pb2.ADAPTER_STATE_UNSPECIFIED),
    )


def published(report: PublishReport) -> adapters_pb2.UploadResponse:
    return adapters_pb2.UploadResponse(
        name=report.name,
        generation=report.generation,
        ranks=report.ranks,
        targets=report.targets,
        num_bytes=report.num_bytes,
        modules_matched=report.modules_matched,
        modules_total=report.modules_total,
        created_at=report.created_at,
        existed=report.existed,
        ignored=report.ignored,
    )


def _finish(reason: str | None) -> inference_pb2.FinishReason:
    if reason is None:
        return inference_pb2.FINISH_REASON_UNSPECIFIED
    return _FINISH.get(reason, inference_pb2.FINISH_REASON_UNSPECIFIED)


def _stop(reason: str | int | None) -> inference_pb2.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, str):
        return inference_pb2.StopReason(text=reason)
    return inference_pb2.StopReason(token_id=reason)


def _logprob(entry: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        logprob=entry.logprob,
        top=[
            inference_pb2.TopLogprob(token_id=top.token_id, token=top.token, logprob=top.logprob)
            for top in entry.top
        ],
    )
