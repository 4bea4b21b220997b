"""An answer of `choose` for programs: schema `manyhands.choose/1`, described in docs/choosing.md.

One unit for each key, which its name ends in; no key is a name of a machine or a model; null where nothing is known.
"""

from typing import Any

from manyhands.plan.choose import Beaten, Chosen
from manyhands.plan.fit import usable
from manyhands.plan.offer import Loss, Offer
from manyhands.plan.report.chosen import Shown
from manyhands.plan.tiers import disk_rate
from manyhands.plan.wish import Wish

SCHEMA = "manyhands.choose/1"


def as_dict(chosen: Chosen, rows: list[Shown], wish: Wish, notes: list[str]) -> dict[str, Any]:
    """The question, the offers that are shown, everything that lost."""
    return {
        "schema": SCHEMA,
        "asked": {
            "users": wish.users,
            "context_tokens": wish.context,
            "prompt_tokens": wish.prompt,
            "answer_tokens": wish.answer,
            "cache_bits": wish.kv_bits,
            "tokens_per_second_each": wish.speed,
            "first_token_seconds": wish.first,
            "usd_per_hour": wish.per_hour,
            "usd_per_million_tokens": wish.per_million,
            "layouts": list(wish.layouts),
            "most_devices": wish.devices,
        },
        "considered": chosen.considered,
        "offers_found": len(chosen.offers),
        "offers": [_offer(row.offer) | _shown(row) for row in rows],
        "losses": [_loss(loss) for loss in chosen.losses],
        "beaten": [_beaten(each) for each in chosen.beaten],
        "notes": notes,
    }


def _offer(made: Offer) -> dict[str, Any]:
    case, machine, tiers = made.case, made.place.machine, made.tiers
    return {
        "model": case.id,
        "parameters": case.subject.counts.total,
        "active_parameters": case.subject.counts.active,
        "format": case.storage.name,
        "bits_per_weight": case.bits,
        "as_published": case.native,
        "machine": machine.name,
        "devices": machine.devices,
        "copies": made.copies,
        "users_per_copy": made.users,
        "layout": tiers.layout,
        "weights_bytes": made.need.weights,
        "cache_bytes": made.need.cache,
        "working_bytes": made.need.working,
        "usable_bytes": usable(machine),
        "experts_device_bytes": tiers.device,
        "experts_host_bytes": tiers.host,
        "experts_disk_bytes": tiers.disk,
        "host_bytes_per_second": made.place.host.all_bandwidth if made.place.host is not None else None,
        "disk_bytes_per_second": disk_rate(machine),
        "tokens_per_second_each": made.speed,
        "tokens_per_second": made.speed * made.users * made.copies,
        "limits": [{"what": what, "seconds": seconds} for what, seconds in made.limits],
        "first_token_seconds": made.first,
        "usd_per_hour": made.per_hour,
        "usd_per_million_tokens": made.per_million,
    }


def _shown(row: Shown) -> dict[str, Any]:
    found, users = row.expected, row.offer.users
    return {
        "estimate_tokens_per_second_each": found.tokens_per_second / users if found is not None else None,
        "estimate_low_tokens_per_second_each": found.low / users if found is not None else None,
        "estimate_high_tokens_per_second_each": found.high / users if found is not None else None,
        "estimate_source": found.source if found is not None else None,
        "most_users": row.most_users,
        "longest_context_tokens": row.longest_context,
        "more_precise": _loss(row.wider) if row.wider is not None else None,
    }


def _loss(loss: Loss) -> dict[str, Any]:
    return {
        "model": loss.case.id,
        "format": loss.case.storage.name,
        "machine": loss.place.machine.name,
        "devices": loss.place.machine.devices,
        "failed": loss.what,
        "times_too_much": loss.ratio,
        "said": loss.said,
    }


def _beaten(each: Beaten) -> dict[str, Any]:
    made, by = each.offer, each.by
    return {
        "model": made.case.id,
        "format": made.case.storage.name,
        "machine": made.place.machine.name,
        "by_model": by.case.id,
        "by_format": by.case.storage.name,
        "by_machine": by.place.machine.name,
    }
