"""A compiled training step as a record for JSON, the record as Markdown, and the difference between two records."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.job import flops_per_update, part_flops
from benchmarks.plan import parts, traffic
from benchmarks.plan.machine_code import Code
from benchmarks.plan.parts import Cost
from benchmarks.plan.program import Program, Shape
from benchmarks.plan.targets import Target
from benchmarks.tables import table
from recipe.config import RunConfig, to_dict
from recipe.mesh import MeshShape, parse_mesh

LARGEST = 5
"""Arrays that are named."""


def summarise(
    program: Program,
    costs: list[Cost],
    config: RunConfig,
    target: Target,
    *,
    devices: int,
    memory: Mapping[str, int],
    state_arrays: int,
    code: Mapping[str, Code],
    formula: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """All that is known of one training step; numbers are a device's, an update's, bytes, FLOPs and seconds."""
    total = _sum(costs)
    seconds, tokens = total["seconds"], config.tokens_per_step
    named: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in costs:
        named[cost.part].append(cost)
    sums = {name: _sum(group) for name, group in named.items()}
    products = [(cost.launch.times, product) for cost in costs for product in cost.launch.products]
    dtypes: collections.Counter[str] = collections.Counter()
    for times, product in products:
        dtypes[product.dtypes] += times
    counted = flops_per_update(config)
    rates, shape = target.rates, parse_mesh(config.mesh) or MeshShape()
    on_links = sums[parts.COLLECTIVES]["seconds"] if parts.COLLECTIVES in sums else 0.0
    # The longest way is one after another; the shortest hides all that travels behind what is computed, or all of that.
    least = max(on_links, seconds - on_links)
    return {
        "target": target.name,
        "device": target.kind,
        "devices": devices,
        "rates": None if rates is None else dataclasses.asdict(rates),
        "config": to_dict(config),
        "tokens": tokens,
        "total": total,
        "tokens_per_second": tokens / seconds if seconds else None,
        "mfu": counted / devices / seconds / rates.products if rates and seconds else None,
        "overlapped": {
            "seconds": least,
            "tokens_per_second": tokens / least,
            "mfu_of_peak": counted / devices / least / rates.peak,
        }
        if rates and seconds
        else None,
        "mfu_of_peak": counted / devices / seconds / rates.peak if rates and seconds else None,
        "seconds_on_links": on_links,
        "flops_counted": counted,
        "product_flops": _product_flops(costs),
        "product_flops_expected": expected_product_flops(config, logits_twice(costs)),
        "parts": dict(sorted(sums.items(), key=lambda item: (-item[1]["seconds"], -item[1]["bytes"]))),
        "products": dict(sorted(dtypes.items())),
        "float32_operands": sum(n for n, p in products if "f32" in (p.left.dtype, p.right.dtype)),
        "fused_attention": sum(c.launch.times for c in costs if "fmha" in c.launch.instruction.target),
        "largest": [[str(shape), shape.bytes] for shape in _largest(program)],
        "logits": sorted(str(shape) for shape in all_logits(program, config, shape.rows)),
        "collectives": _collectives(costs),
        "travels": traffic.travels(costs, shape),
        "formula": formula or [],
        "memory": dict(memory),
        "device_memory": target.memory,
        "state_arrays": state_arrays,
        "aliased": program.aliased,
        "newton_schulz": newton_schulz(program, costs),
        "loops": _loops(program),
        "branches": len(program.branches),
        "kernels": _kernels(costs, code),
        "library_calls": _library_calls(costs),
        "machine_code": _machine_code(code),
    }


def _sum(costs: Iterable[Cost]) -> dict[str, float]:
    """Launches, FLOPs, bytes, words and seconds of some launches, and the seconds of each resource alone."""
    keys = ("launches", "flops", "bytes", "words", "seconds")
    alone = ("products_alone", "memory_alone", "threefry_alone")
    total: dict[str, float] = dict.fromkeys((*keys, *alone), 0)
    for cost in costs:
        times = cost.launch.times
        values = (1, cost.flops, cost.launch.bytes, cost.words, cost.seconds, *cost.alone)
        for key, value in zip(total, values, strict=True):
            total[key] += times * value
    return total


def _product_flops(costs: list[Cost]) -> dict[str, int]:
    """FLOPs of matrix products in all but attention and in two parts of it: exact, or as a kernel's estimate says."""
    flops: collections.Counter[str] = collections.Counter()
    for cost in costs:
        flops[cost.part] += cost.launch.times * int(cost.flops)
    without = sum(flops.values()) - flops[parts.ATTENTION]
    return {
        "without attention": without,
        parts.NEWTON_SCHULZ: flops[parts.NEWTON_SCHULZ],
        parts.HEAD: flops[parts.HEAD],
    }


def logits_twice(costs: Iterable[Cost]) -> bool:
    """Whether the loss is `jax_impl.loss_kernel`'s, which makes every logit a second time."""
    return any(cost.launch.kernel == "grad_logits_kernel" for cost in costs)


def expected_product_flops(config: RunConfig, logits_twice: bool = False) -> dict[str, float]:
    """The same by `benchmarks.job.FLOP_FORMULA`, of one device that does all the work; 8 V D a token for 6 if asked."""
    by_part = part_flops(config)
    again = by_part["cross_entropy"] / 3 if logits_twice else 0.0
    return {
        "without attention": flops_per_update(config) - by_part["attention"] + again,
        parts.NEWTON_SCHULZ: by_part["newton_schulz"],
        parts.HEAD: by_part["cross_entropy"] + again,
    }


def _largest(program: Program) -> list[Shape]:
    return sorted(program.arrays(), key=lambda shape: (-shape.bytes, str(shape)))[:LARGEST]


def all_logits(program: Program, config: RunConfig, devices: int = 1) -> set[Shape]:
    """Arrays with a logit of every token of a device's micro-batch: the [B,T,V] that the loss promises not to make."""
    V, D = config.model.vocab_size, config.model.hidden_size
    tokens = config.batch_size * config.sequence_length // devices

    def holds(shape: Shape) -> bool:
        if V not in shape.dims:
            return False
        others = list(shape.dims)
        others.remove(V)
        return math.prod(others) >= tokens and D not in others

    return {shape for shape in program.arrays() if holds(shape)}


def newton_schulz(program: Program, costs: list[Cost]) -> dict[str, Any]:
    """The stacks (matrices, rows, columns) that the iterations carry, and the launches of one iteration."""
    inner = collections.Counter(
        cost.launch.loops[-1] for cost in costs if cost.part == parts.NEWTON_SCHULZ and cost.launch.loops
    )
    stacks = []
    for loop in program.loops:
        arrays = [shape for shape in loop.carried if len(shape.dims) >= 2]
        if loop.name in inner and arrays:
            dims = max(arrays, key=lambda shape: shape.elements).dims
            stacks.append([math.prod(dims[:-2]), *dims[-2:]])
    return {"stacks": sorted(stacks), "launches_per_iteration": max(inner.values(), default=0)}


def _collectives(costs: list[Cost]) -> dict[str, dict[str, int]]:
    """Every kind of collective: how often it runs, the bytes of the wholes, and those that leave a device."""
    found: dict[str, dict[str, int]] = {}
    for launch in (cost.launch for cost in costs if cost.launch.collective):
        one = found.setdefault(launch.collective, {"launches": 0, "bytes": 0, "sent": 0})
        one["launches"] += launch.times
        one["sent"] += launch.times * launch.sent
        one["bytes"] += launch.times * launch.payload
    return dict(sorted(found.items()))


def _loops(program: Program) -> list[dict[str, Any]]:
    """Every loop by name, trips and starts, and how many there are of it."""
    counted = collections.Counter((loop.op_name, loop.trips, loop.starts) for loop in program.loops)
    return [{"name": n, "trips": t, "starts": s, "loops": count} for (n, t, s), count in sorted(counted.items())]


def _kernels(costs: list[Cost], code: Mapping[str, Code]) -> list[dict[str, Any]]:
    """Kernels written by hand, by name: launches, work, machine code."""
    groups: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in costs:
        if cost.launch.kernel:
            groups[cost.launch.kernel].append(cost)
    return [
        {
            "name": name,
            "launches": sum(cost.launch.times for cost in group),
            "flops": sum(cost.launch.times * cost.flops for cost in group),
            "bytes": sum(cost.launch.times * cost.launch.bytes for cost in group),
            "seconds": sum(cost.launch.times * cost.seconds for cost in group),
            "flops_known": all(cost.known for cost in group),
            # XLA numbers kernels of one name.
            "code": [
                {"kernel": key, **one._asdict()}
                for key, one in sorted(code.items())
                if key == name or key.removeprefix(f"{name}_").isdecimal()
            ],
        }
        for name, group in sorted(groups.items())
    ]


def _library_calls(costs: list[Cost]) -> dict[str, int]:
    """Custom calls that are no kernel of ours: how often each target is called."""
    found: collections.Counter[str] = collections.Counter()
    for launch in (cost.launch for cost in costs):
        if launch.instruction.target and not launch.kernel:
            found[launch.instruction.target] += launch.times
    return dict(sorted(found.items()))


def _machine_code(code: Mapping[str, Code]) -> dict[str, Any]:
    """Of all compiled kernels: their number, the most registers, and those that spill."""
    return {
        "kernels": len(code),
        "registers": max((one.registers for one in code.values()), default=0),
        "spilling": {name: one.spilled for name, one in sorted(code.items()) if one.spilled},
    }


def title(plan: Mapping[str, Any]) -> str:
    """Preset, shape, dropout, device."""
    config = plan["config"]
    shape = f"{config['accumulation']} x {config['batch_size']} x {config['sequence_length']}"
    device = plan["device"]
    if plan["devices"] > 1:
        axes = [f"{name}={size}" for name, size in _mesh(config).items() if size > 1]
        how = [*axes, *(["by layer"] if config["gather"] == "layer" else [])]
        device = f"{plan['devices']} x {device} ({', '.join(how)})"
    extra = [name for name, on in (("loop over layers", config.get("scan_layers")),) if on]
    extra += ["remat"] if config["precision"]["remat"] else []
    compute, dropout = config["precision"]["compute"], config["model"]["dropout"]
    return f"{config['preset']}, {shape} tokens, {compute}, dropout {dropout:g}, {', '.join([*extra, device])}"


def _mesh(config: Mapping[str, Any]) -> dict[str, int]:
    return (parse_mesh(config["mesh"]) or MeshShape())._asdict()


def markdown(plan: Mapping[str, Any]) -> str:
    """The record as a section: what was compiled, its parts, and what else the program tells."""
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    lines = [
        f"## {title(plan)}",
        "",
        f"`{plan['command']}`",
        "",
        f"Compiled, not run. {versions}; commit {plan['git_commit']}; products by {plan['products_by']}"
        + "".join(f", {name}={value}" for name, value in plan["options"].items())
        + ".",
        "",
        *_parts_table(plan),
        "",
        *(f"- {line}" for line in _facts(plan)),
        "",
        *(traffic.markdown(plan["travels"], plan["formula"]) if plan["travels"] else []),
        *_kernel_table(plan),
    ]
    return "\n".join(lines)


def _parts_table(plan: Mapping[str, Any]) -> list[str]:
    timed = plan["rates"] is not None
    columns = {"part": "l", "launches": "r", "TFLOP": "r", "GB": "r"}
    if timed:
        columns |= {"ms on paper": "r", "share": "r", "products / memory / Threefry alone, ms": "r"}
    whole = plan["total"]["seconds"]
    rows = []
    for name, part in [*plan["parts"].items(), ("all", plan["total"])]:
        row = [name, f"{part['launches']:,}", f"{part['flops'] / 1e12:,.3f}", f"{part['bytes'] / 1e9:,.1f}"]
        if timed:
            alone = (part[f"{key}_alone"] for key in ("products", "memory", "threefry"))
            row += [
                f"{1e3 * part['seconds']:,.2f}",
                f"{part['seconds'] / whole:.1%}",
                " / ".join(f"{1e3 * seconds:,.2f}" if seconds else "–" for seconds in alone),
            ]
        rows.append(row)
    return table(columns, rows)


def _facts(plan: Mapping[str, Any]) -> list[str]:
    """What the program tells beside its parts, a sentence each."""
    memory, facts = plan["memory"], []
    if plan["rates"] is not None:
        facts.append(
            f"{plan['tokens_per_second']:,.0f} tokens/s on paper, MFU {plan['mfu']:.1%} of "
            f"{plan['rates']['products'] / 1e12:,.0f} TFLOP/s a device"
        )
    if plan["travels"] and plan["overlapped"]:
        hidden = plan["overlapped"]
        facts.append(
            f"step: {1e3 * plan['total']['seconds']:,.1f} ms if nothing overlaps, of which "
            f"{1e3 * plan['seconds_on_links']:,.1f} ms on the links, MFU {plan['mfu_of_peak']:.1%} of the published "
            f"peak; {1e3 * hidden['seconds']:,.1f} ms if all of it does, {hidden['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {hidden['mfu_of_peak']:.1%}"
        )
    held = f"{memory['total'] / 2**30:,.2f} GiB a device"
    if plan["device_memory"]:
        fits = "fits" if memory["total"] <= plan["device_memory"] else "does not fit"
        held += f", {memory['total'] / plan['device_memory']:.0%} of {plan['device_memory'] / 2**30:,.1f}: {fits}"
    facts.append(
        f"memory: {held}; arguments {_mib(memory['arguments'])}, of which {_mib(memory['aliased'])} are written in "
        f"place, temporaries {_mib(memory['temporaries'])} MiB"
        + ("; cuDNN's workspace is not in it" if any("cudnn" in name for name in plan["library_calls"]) else "")
    )
    facts.append(f"state arrays written in place: {plan['aliased']} of {plan['state_arrays']}")
    counted, expected = plan["product_flops"], plan["product_flops_expected"]
    ratios = ", ".join(f"{name} {counted[name] * plan['devices'] / expected[name]:.6f}" for name in counted)
    of = "on one device" if plan["devices"] == 1 else "of all devices"
    facts.append(f"FLOPs of the products over `benchmarks.job`'s formula, {of}: {ratios}")
    kinds = ", ".join(f"{name}: {count:,}" for name, count in plan["products"].items())
    facts.append(f"products by dtype: {kinds}; with a float32 operand: {plan['float32_operands']:,}")
    calls = ", ".join(f"{name} {count:,}" for name, count in plan["library_calls"].items())
    facts.append(f"library calls: {calls or 'none'}")
    facts.append("largest arrays: " + ", ".join(f"{name} {_mib(size)} MiB" for name, size in plan["largest"]))
    facts.append("[B,T,V]: " + (", ".join(plan["logits"]) or "none"))
    stacks = ", ".join(f"{count} x {rows} x {columns}" for count, rows, columns in plan["newton_schulz"]["stacks"])
    facts.append(
        f"Newton-Schulz: stacks of {stacks or 'none'}, "
        f"{plan['newton_schulz']['launches_per_iteration']} launches an iteration"
    )
    collectives = ", ".join(
        f"{name} {one['launches']:,} ({one['bytes'] / 1e6:,.1f} MB)" for name, one in plan["collectives"].items()
    )
    facts.append(f"collectives: {collectives or 'none'}")
    loops = "; ".join(
        f"{loop['name'].replace('jit(train_step)/', '')}: {loop['trips'] or 'unknown'} trips x {loop['starts']}"
        + (f", {loop['loops']} of them" if loop["loops"] > 1 else "")
        for loop in plan["loops"]
    )
    facts.append(f"loops: {loops or 'none'}; branches chosen on the device: {plan['branches']}")
    code = plan["machine_code"]
    if code["kernels"]:
        spilling = ", ".join(f"{name} {size} bytes" for name, size in code["spilling"].items())
        facts.append(
            f"machine code: {code['kernels']} kernels, at most {code['registers']} registers, spilling: "
            + (spilling or "none")
        )
    return facts


def _kernel_table(plan: Mapping[str, Any]) -> list[str]:
    if not plan["kernels"]:
        return []
    columns = {"kernel written by hand": "l", "launches": "r", "TFLOP": "r", "GB": "r", "ms on paper": "r"}
    columns |= {"registers": "r", "spilled bytes": "r", "shared memory": "r", "grid x threads": "r"}
    rows = []
    for kernel in plan["kernels"]:
        flops = f"{kernel['flops'] / 1e12:,.3f}" if kernel["flops_known"] else "unknown"
        code = kernel["code"]
        cells = [
            ", ".join(dict.fromkeys(str(one[key]) for one in code)) or "–" for key in ("registers", "spilled", "shared")
        ]
        grids = ", ".join(dict.fromkeys(f"{'·'.join(map(str, one['grid']))} x {one['threads']}" for one in code))
        rows.append(
            [
                *(kernel["name"], f"{kernel['launches']:,}", flops, f"{kernel['bytes'] / 1e9:,.1f}"),
                *(f"{1e3 * kernel['seconds']:,.2f}", *cells, grids or "–"),
            ]
        )
    return [*table(columns, rows), ""]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Two plans by part and in total, old -> new."""
    names = list(dict.fromkeys([*new["parts"], *old["parts"]]))
    nothing = dict.fromkeys(new["total"], 0)
    rows = []
    for name in [*names, "all"]:
        before, after = (plan["total"] if name == "all" else plan["parts"].get(name, nothing) for plan in (old, new))
        if before != after or name == "all":
            rows.append(
                [
                    name,
                    _change(before["launches"], after["launches"], ",.0f"),
                    _change(before["flops"] / 1e12, after["flops"] / 1e12, ",.3f"),
                    _change(before["bytes"] / 1e9, after["bytes"] / 1e9, ",.1f"),
                    _change(1e3 * before["seconds"], 1e3 * after["seconds"], ",.2f"),
                ]
            )
    columns = {"part": "l", "launches": "r", "TFLOP": "r", "GB": "r", "ms on paper": "r"}
    temporaries = _change(old["memory"]["temporaries"] / 2**20, new["memory"]["temporaries"] / 2**20, ",.0f")
    return "\n".join(
        [
            f"### against {title(old)}, commit {old['git_commit']}",
            "",
            *table(columns, rows),
            "",
            f"- temporaries {temporaries} MiB",
            "",
        ]
    )


def _change(before: float, after: float, form: str) -> str:
    """`before -> after (difference)`, or the one value that both are when printed."""
    first, second = format(before, form), format(after, form)
    return first if first == second else f"{first} -> {second} ({after - before:+{form}})"
