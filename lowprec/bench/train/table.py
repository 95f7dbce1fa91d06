"""The results as a table for people."""

from lowprec.bench.train.works import all_works

HEAD = ("work", "by", "tokens/s", "step ms, p50 [p20, p80]", "peak GB", "reserved GB", "lowprec is", "of the limit")


def markdown(rows: list[dict]) -> str:
    """The newest result of every run, by GPU, in the order of the works; under it what each target says and what the
    limits are made of."""
    if not rows:
        return "No results yet.\n"
    newest = {(row["gpu"], row["work"], row["peer"]): row for row in rows}
    works = all_works()
    order = list(works)
    parts = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        mine = [row for key, row in newest.items() if key[0] == gpu and key[1] in works]
        mine.sort(key=lambda row: order.index(row["work"]))
        stamp = " ".join(f"{name} {number}" for name, number in mine[-1]["versions"].items()) if mine else ""
        parts += [f"## {gpu}", stamp, "", _line(HEAD), _line(["---"] * len(HEAD))]
        parts += [_line(_cells(row, newest)) for row in mine if row["peer"] != "limit"]
        parts += ["", *(f"- {name}: {works[name].target}." for name in dict.fromkeys(r["work"] for r in mine))]
        parts += ["", *(_kernels(row) for row in mine if row.get("kernel_ms"))]
        parts += ["", *(_limit(row) for row in mine if row["peer"] == "limit" and row["status"] == "ok"), ""]
    return "\n".join(parts)


def _cells(row: dict, newest: dict) -> list[str]:
    if row["status"] != "ok":
        return [row["work"], row["peer"], row["status"], row.get("error", "")[:80], "", "", "", ""]
    spread = f"{row['step_ms_p50']:.1f} [{row['step_ms_p20']:.1f}, {row['step_ms_p80']:.1f}]"
    ours, limit = (newest.get((row["gpu"], row["work"], peer)) for peer in ("lowprec", "limit"))
    speed = row["tokens_per_second"]
    factor = share = ""
    if row["peer"] != "lowprec" and ours and ours["status"] == "ok":
        factor = f"{ours['tokens_per_second'] / speed:.2f}x"
    if limit and limit["status"] == "ok":
        share = f"{speed / limit['tokens_per_second']:.0%}"
    memory = [f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("peak_gb", "reserved_gb")]
    return [row["work"], row["peer"], f"{speed:,.0f}", spread, *memory, factor, share]


def _kernels(row: dict) -> str:
    """Products and other work apart: of one more step, watched by the profiler."""
    products = row["kernel_ms"].get("products", 0.0)
    other = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["kernel_ms"].items() if kind != "products")
    return f"- Kernels of a step of {row['work']}, ms: products {products:.1f}; {other}."


def _limit(row: dict) -> str:
    parts = ", ".join(f"{name} {ms:.1f} ms" for name, ms in row["step_ms"].items())
    return (
        f"Limit of {row['work']}: {row['tokens_per_second']:,.0f} tokens/s = {row['step_ms_p50']:.1f} ms: {parts}, at "
        f"{row['copy_gb_per_s']:.0f} GB/s and the products' rates: {'; '.join(row['rates'])}."
    )


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
