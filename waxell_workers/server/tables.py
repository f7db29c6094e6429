"""The tables of the database, in its present version, as SQL.

One row per run, with the sums of its calls kept beside it, so that the list of runs reads one table. Runs own
everything else by foreign key: deleting a run deletes its calls, steps, spans, scores and record ids. Values
without a fixed shape (metadata, inputs, attributes) are JSON text. No statement has `;` but at its end.
"""

CALLS = """\
CREATE TABLE calls (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    call_id TEXT NOT NULL DEFAULT '',
    span INTEGER NOT NULL DEFAULT 0,             -- 1: a REST span has told its duration and times
    model TEXT NOT NULL,
    response_model TEXT NOT NULL DEFAULT '',
    provider TEXT NOT NULL DEFAULT '',
    operation TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'ok',
    error TEXT NOT NULL DEFAULT '',
    started_at REAL NOT NULL,
    duration_ms REAL,
    ttft_ms REAL,
    tokens_in INTEGER,                           -- NULL, here and below: the provider did not say
    tokens_out INTEGER,
    tokens_cached INTEGER,
    tokens_cache_written INTEGER,
    tokens_reasoning INTEGER,
    cost_usd REAL,
    prompt TEXT NOT NULL DEFAULT '',
    response TEXT NOT NULL DEFAULT '',
    messages TEXT NOT NULL DEFAULT '[]',
    tool_calls TEXT NOT NULL DEFAULT '[]',
    metadata TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX calls_run ON calls (run_id, started_at);
CREATE INDEX calls_without_span ON calls (run_id, seq) WHERE NOT span;
"""

SUMS = """\
CREATE INDEX runs_sums ON runs (agent_name, status, calls, tokens_in, tokens_out, cost_usd,
    tokens_in_unknown, tokens_out_unknown, cost_unknown);
"""

LINEAGE = """\
CREATE INDEX runs_task ON runs (task_id, started_at, run_id) WHERE task_id <> '';
CREATE INDEX runs_trace ON runs (trace_id, started_at, run_id) WHERE trace_id <> '';
CREATE INDEX runs_root ON runs (root_run_id) WHERE trace_id = '' AND root_run_id <> '';
CREATE INDEX runs_parent_task ON runs (parent_task_id, started_at)
    WHERE parent_task_id <> '' AND parent_run_id = '';
CREATE INDEX runs_linked ON runs (linked_run_id) WHERE linked_run_id <> '';
CREATE INDEX runs_queue ON runs (framework, queue, started_at, wait_s) WHERE queue <> '';
CREATE INDEX runs_spend ON runs (started_at, status, error_type, framework, task, queue, agent_name,
    session_id, user_id, attempt, run_id, calls, tokens_in, tokens_out, cost_usd,
    tokens_in_unknown, tokens_out_unknown, cost_unknown);
CREATE INDEX calls_model ON calls (model, provider, started_at, run_id, tokens_in, tokens_out, cost_usd);
"""
"""For one run's relatives; the last three hold all that is summed up over many runs or calls: no texts."""

TABLES = f"""
CREATE TABLE runs (
    run_id TEXT NOT NULL PRIMARY KEY,
    agent_name TEXT NOT NULL DEFAULT '',
    workflow_name TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'running',
    known INTEGER NOT NULL DEFAULT 0,            -- 0: only other records of it have come so far
    started_at REAL NOT NULL,                    -- Unix seconds
    ended_at REAL,
    duration_ms REAL,                            -- NULL: ended_at - started_at
    error_type TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    framework TEXT NOT NULL DEFAULT '',          -- from the metadata, as all down to user_group
    task TEXT NOT NULL DEFAULT '',
    queue TEXT NOT NULL DEFAULT '',
    attempt INTEGER,
    repeat INTEGER,                              -- which execution of a task that is repeated; or replaced
    replaced INTEGER,
    enqueued_at REAL,
    eta REAL,
    wait_s REAL,
    previous_run_id TEXT NOT NULL DEFAULT '',
    linked_run_id TEXT NOT NULL DEFAULT '',
    parent_task_id TEXT NOT NULL DEFAULT '',
    user_group TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '',
    traceback TEXT NOT NULL DEFAULT '',
    inputs TEXT NOT NULL DEFAULT '{{}}',
    metadata TEXT NOT NULL DEFAULT '{{}}',
    tags TEXT NOT NULL DEFAULT '{{}}',
    result TEXT NOT NULL DEFAULT 'null',
    session_id TEXT NOT NULL DEFAULT '',
    user_id TEXT NOT NULL DEFAULT '',
    trace_id TEXT NOT NULL DEFAULT '',
    task_id TEXT NOT NULL DEFAULT '',
    parent_run_id TEXT NOT NULL DEFAULT '',
    root_run_id TEXT NOT NULL DEFAULT '',
    source TEXT NOT NULL,                        -- rest | ingest
    calls INTEGER NOT NULL DEFAULT 0,
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    cost_usd REAL,
    tokens_in_unknown INTEGER NOT NULL DEFAULT 0, -- how many calls are not in that sum; and so on
    tokens_out_unknown INTEGER NOT NULL DEFAULT 0,
    cost_unknown INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX runs_newest ON runs (started_at, run_id);
CREATE INDEX runs_agent ON runs (agent_name, started_at, run_id);
CREATE INDEX runs_status ON runs (status, started_at, run_id);
{SUMS}CREATE INDEX runs_parent ON runs (parent_run_id) WHERE parent_run_id <> '';

{CALLS}
{LINEAGE}
CREATE TABLE steps (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    position INTEGER NOT NULL DEFAULT 0,
    name TEXT NOT NULL,
    output TEXT NOT NULL DEFAULT 'null',
    at REAL NOT NULL
);
CREATE INDEX steps_run ON steps (run_id);

CREATE TABLE spans (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    matched INTEGER NOT NULL DEFAULT 0,          -- 1: its call has been found, or it is no call's
    position INTEGER NOT NULL DEFAULT 0,
    parent_position INTEGER,
    name TEXT NOT NULL DEFAULT '',
    kind TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL DEFAULT 'ok',
    start_offset_ms REAL,
    duration_ms REAL,
    attributes TEXT NOT NULL DEFAULT '{{}}',
    input_data TEXT NOT NULL DEFAULT 'null',
    output_data TEXT NOT NULL DEFAULT 'null',
    events TEXT NOT NULL DEFAULT '[]'
);
CREATE INDEX spans_run ON spans (run_id, position);
CREATE INDEX spans_without_call ON spans (run_id, position) WHERE NOT matched;

CREATE TABLE scores (
    seq INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    name TEXT NOT NULL,
    data_type TEXT NOT NULL DEFAULT '',
    value TEXT NOT NULL DEFAULT 'null',
    comment TEXT NOT NULL DEFAULT ''
);
CREATE INDEX scores_run ON scores (run_id);

CREATE TABLE records (                           -- every ingest record that was taken: a repeat is recognised
    id TEXT PRIMARY KEY,
    run_id TEXT REFERENCES runs ON DELETE CASCADE,
    at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX records_run ON records (run_id);

CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('accepted', 0), ('duplicates', 0);
"""
