"""Write what Prometheus, Grafana and KubeRay read, from the tables of the code.

python deploy/generate.py            write deploy/prometheus, deploy/grafana/dashboards, deploy/kuberay
python deploy/generate.py --check    exit code 1, naming the files, where one is not as it would be
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    GridPos,
    VariableRefresh,
)

from rlhf_cluster.observe.monitoring.alerts import prometheus_files
from rlhf_cluster.observe.monitoring.grafana_dashboards import (
    DASHBOARDS,
    WIDTH,
    Dashboard,
    Panel,
)
from rlhf_cluster.planning.kuberay import kuberay_files

DEPLOY = Path(__file__).resolve().parent
HEAD = "# Made by deploy/generate.py from rlhf_cluster/planning/kuberay.py.\n"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")


def files() -> dict[Path, str]:
    """Every generated file below `DEPLOY`, and its content."""
    found = {Path("prometheus") / name: text for name, text in prometheus_files().items()}
    for board in DASHBOARDS:
        text = json.dumps(_dashboard(board).build(), cls=JSONEncoder, indent=1, sort_keys=True)
        found[Path("grafana") / "dashboards" / f"{board.uid}.json"] = text + "\n"
    for name, documents in kuberay_files().items():
        found[Path("kuberay") / name] = HEAD + yaml.dump_all(
            documents, Dumper=_Whole, sort_keys=False
        )
    return found


class _Whole(yaml.SafeDumper):
    """Writes a value that is used twice twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _dashboard(board: Dashboard) -> dashboard.Dashboard:
    run = (
        dashboard.QueryVariable("run")
        .label("run")
        .datasource(SOURCE)
        .query("label_values(ray_rlhf_step_number, run)")
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .refresh(VariableRefresh(2))  # whenever the time range changes
    )
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.help)
        .tags(["rlhf"])
        .readonly()
        .refresh("15s")
        .time("now-3h", "now")
        .with_variable(run)
        .link(
            dashboard.DashboardLink("RLHF")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["rlhf"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    )
    y, number = 0, 0
    for title, panels in board.rows:
        number += 1
        built.with_row(dashboard.Row(title).id(number).grid_pos(GridPos(x=0, y=y, w=WIDTH, h=1)))
        y, x = y + 1, 0
        for panel in panels:
            number += 1
            place = GridPos(x=x, y=y, w=panel.width, h=panel.height)
            built.with_panel(_panel(panel).id(number).grid_pos(place))
            x += panel.width
        y += max(panel.height for panel in panels)
    return built


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    if panel.shape == "number":
        built = stat.Panel().graph_mode(BigValueGraphMode.AREA)
    else:
        legend = (
            common.VizLegendOptions()
            .show_legend(True)
            .placement(LegendPlacement.BOTTOM)
            .display_mode(LegendDisplayMode.LIST)
        )
        built = timeseries.Panel().legend(legend).line_width(2).fill_opacity(6)
    built.title(panel.title).description(panel.help).unit(panel.unit).datasource(SOURCE)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        built.with_target(
            prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter)
        )
    return built


def main() -> int:
    wrong = []
    for name, text in files().items():
        path = DEPLOY / name
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text() != text:
                wrong.append(str(name))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if wrong:
        print(f"not as the code makes them: {', '.join(wrong)}. Run python deploy/generate.py")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
