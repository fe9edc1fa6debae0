"""Ray's client of the jobs of a cluster, and the end of a log without the rest of it."""

from __future__ import annotations

from urllib.parse import urlencode

import requests
from ray.job_submission import JobSubmissionClient

TAIL_BYTES = 16 << 20
TAIL_TIMEOUT_S = 20.0


class DashboardClient(JobSubmissionClient):
    """What `actors.job_calls.JobClient` asks for."""

    def get_log_tail(self, job_id: str, node_id: str, num_lines: int) -> str:
        """The last `num_lines` lines of a job whose driver ran on `node_id`, and of these the last
        `TAIL_BYTES`: the node looks for them in its file, and sends no more."""
        query = urlencode({"submission_id": job_id, "node_id": node_id, "lines": num_lines})
        with requests.get(
            f"{self._address}/api/v0/logs/file?{query}",
            headers=self._headers,
            cookies=self._cookies,
            verify=self._verify,
            stream=True,
            timeout=TAIL_TIMEOUT_S,
        ) as answer:
            if answer.status_code != requests.codes.ok:
                self._raise_error(answer)
            tail = b""
            for chunk in answer.iter_content(1 << 20):
                tail = (tail + chunk)[-TAIL_BYTES:]
        return tail.decode(errors="replace")
