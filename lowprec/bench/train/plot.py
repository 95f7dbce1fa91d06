"""The results as a plot: tokens/s of each run, with its memory, and the limit as a line."""

from pathlib import Path

from lowprec.bench.train.works import all_works

COLOURS = {"lowprec": "#1f6fb4", "transformers": "#8c8c8c", "transformers+liger": "#6b6b6b", "unsloth": "#b9821f",
           "torchao": "#7f5a9a"}  # fmt: skip


def plot(rows: list[dict], path: Path) -> bool:
    """Write a PNG of the newest runs on the GPU of the last row; False where no work has a peer to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    gpu = rows[-1]["gpu"] if rows else ""
    newest = {(row["work"], row["peer"]): row for row in rows if row["gpu"] == gpu and row["status"] == "ok"}
    works = [name for name in all_works() if len({p for w, p in newest if w == name} - {"limit"}) > 1]
    if not works:
        return False
    sizes = [sum((name, peer) in newest for peer in COLOURS) for name in works]
    figure, axes = plt.subplots(
        len(works), 1, figsize=(8, 0.5 + sum(0.32 * size + 0.55 for size in sizes)), squeeze=False,
        gridspec_kw={"height_ratios": [size + 0.6 for size in sizes]}, layout="constrained",
    )  # fmt: skip
    for axis, name in zip(axes[:, 0], works, strict=True):
        _bars(axis, name, newest)
    figure.suptitle(f"Tokens/s on {gpu}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _bars(axis, name: str, newest: dict[tuple[str, str], dict]) -> None:
    peers = [peer for peer in COLOURS if (name, peer) in newest][::-1]
    found = [newest[name, peer] for peer in peers]
    axis.barh(peers, [row["tokens_per_second"] for row in found], color=[COLOURS[peer] for peer in peers], height=0.72)
    limit = newest.get((name, "limit"))
    largest = max(row["tokens_per_second"] for row in [*found, *([limit] if limit else [])])
    for place, row in enumerate(found):
        speed = row["tokens_per_second"]
        text = f"{speed:,.0f}" + (f" in {row['peak_gb']:.1f} GB" if row.get("peak_gb") is not None else "")
        inside = speed > 0.25 * largest
        colour = "white" if inside else "black"
        axis.text(
            speed, place, f" {text} ", ha="right" if inside else "left", va="center", fontsize=8, color=colour,
            fontweight="bold" if peers[place] == "lowprec" else None,
        )  # fmt: skip
    if limit is not None:
        place = limit["tokens_per_second"]
        axis.axvline(place, color="#c0392b", linestyle=":", linewidth=1.2)
        axis.text(
            place, len(peers) - 0.45, f"limit {place:,.0f} ", color="#c0392b", fontsize=7, ha="right", va="bottom"
        )
    axis.set_xlim(0, 1.06 * largest)
    work = all_works()[name]
    axis.set_title(f"{name}: {work.batch} x {work.length} tokens", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
