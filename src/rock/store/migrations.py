"""The schema as numbered migrations: step N brings a database from version N - 1 to N. Released steps never change.

A store runs the missing steps when it opens, each in one transaction with the new version, under a lock that excludes
other processes.
"""

from __future__ import annotations

SQLITE: tuple[tuple[str, ...], ...] = (
    (  # 1: sandboxes
        """CREATE TABLE IF NOT EXISTS sandbox (
            id TEXT PRIMARY KEY,
            version INTEGER NOT NULL,
            state TEXT NOT NULL,
            created_at REAL NOT NULL,
            stopped_at REAL,
            idempotency_key TEXT UNIQUE,
            info TEXT NOT NULL,
            config TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE INDEX IF NOT EXISTS sandbox_state ON sandbox (state, created_at)",
        "CREATE INDEX IF NOT EXISTS sandbox_created ON sandbox (created_at, id)",
    ),
    (  # 2: tenants: idempotency keys are per tenant, and usage can be summed; keys, starts and leases
        """CREATE TABLE sandbox_2 (
            id TEXT PRIMARY KEY,
            version INTEGER NOT NULL,
            state TEXT NOT NULL,
            created_at REAL NOT NULL,
            stopped_at REAL,
            tenant TEXT NOT NULL,
            idempotency_key TEXT,
            cpus REAL NOT NULL,
            memory INTEGER NOT NULL,
            info TEXT NOT NULL,
            config TEXT NOT NULL,
            UNIQUE (tenant, idempotency_key)
        ) WITHOUT ROWID""",
        # Existing records belong to the server's owner, who has no quota.
        """INSERT INTO sandbox_2 SELECT id, version, state, created_at, stopped_at, '', idempotency_key, 0, 0, info,
            config FROM sandbox""",
        "DROP TABLE sandbox",
        "ALTER TABLE sandbox_2 RENAME TO sandbox",
        "CREATE INDEX sandbox_state ON sandbox (state, created_at)",
        "CREATE INDEX sandbox_created ON sandbox (created_at, id)",
        "CREATE INDEX sandbox_tenant ON sandbox (tenant, state)",
        "CREATE TABLE start (tenant TEXT NOT NULL, at REAL NOT NULL)",
        "CREATE INDEX start_tenant ON start (tenant, at)",
        """CREATE TABLE api_key (
            digest TEXT PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            created_at REAL NOT NULL,
            info TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE lease (
            name TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            token INTEGER NOT NULL,
            until REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    (  # 3: workers that joined. beat: number of heartbeats; seen_at: of the last, by this database's clock, for display
        """CREATE TABLE worker (
            name TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            url TEXT NOT NULL,
            epoch INTEGER NOT NULL,
            beat INTEGER NOT NULL,
            lost INTEGER NOT NULL,
            draining INTEGER NOT NULL,
            version TEXT NOT NULL,
            status TEXT NOT NULL,
            seen_at REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    (  # 4: records in insertion order. In the order of ids, which are random, each record was written to a page of its
       # own, and so was each of its index entries: a create wrote 30 KB to the log, and writes 8
        """CREATE TABLE sandbox_4 (
            id TEXT NOT NULL PRIMARY KEY,
            version INTEGER NOT NULL,
            state TEXT NOT NULL,
            created_at REAL NOT NULL,
            stopped_at REAL,
            tenant TEXT NOT NULL,
            idempotency_key TEXT,
            cpus REAL NOT NULL,
            memory INTEGER NOT NULL,
            info TEXT NOT NULL,
            config TEXT NOT NULL
        )""",
        """INSERT INTO sandbox_4 SELECT id, version, state, created_at, stopped_at, tenant, idempotency_key, cpus,
            memory, info, config FROM sandbox ORDER BY created_at""",
        "DROP TABLE sandbox",
        "ALTER TABLE sandbox_4 RENAME TO sandbox",
        """CREATE UNIQUE INDEX sandbox_key ON sandbox (tenant, idempotency_key)
            WHERE idempotency_key IS NOT NULL""",
        "CREATE INDEX sandbox_state ON sandbox (state, created_at)",
        "CREATE INDEX sandbox_created ON sandbox (created_at, id)",
        "CREATE INDEX sandbox_tenant ON sandbox (tenant, state)",
    ),
    (  # 5: facts about the store itself: its identity
        "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO about VALUES ('identity', lower(hex(randomblob(16))))",
    ),
    (  # 6: names, unique among the sandboxes of a tenant that have not ended
        "ALTER TABLE sandbox ADD COLUMN name TEXT",
        """CREATE UNIQUE INDEX sandbox_name ON sandbox (tenant, name)
            WHERE name IS NOT NULL AND state IN ('pending', 'running', 'stopping')""",
    ),
    (  # 7: volumes
        """CREATE TABLE volume (
            id TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            worker TEXT NOT NULL,
            size INTEGER NOT NULL,
            state TEXT NOT NULL,
            created_at REAL NOT NULL,
            idempotency_key TEXT,
            UNIQUE (tenant, name),
            UNIQUE (tenant, idempotency_key)
        ) WITHOUT ROWID""",
        "CREATE INDEX volume_worker ON volume (worker)",
    ),
    (  # 8: jobs and their trials. task: index in the tasks of the job; until: end of the lease; reward: of `info`
        """CREATE TABLE job (
            id TEXT NOT NULL PRIMARY KEY,
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            created_at REAL NOT NULL,
            started_at REAL,
            finished_at REAL,
            cancelled INTEGER NOT NULL,
            tasks INTEGER NOT NULL,
            attempts INTEGER NOT NULL,
            labels TEXT NOT NULL,
            idempotency_key TEXT,
            spec TEXT NOT NULL
        )""",
        "CREATE UNIQUE INDEX job_key ON job (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL",
        "CREATE INDEX job_created ON job (tenant, created_at)",
        """CREATE TABLE trial (
            job TEXT NOT NULL,
            number INTEGER NOT NULL,
            task INTEGER NOT NULL,
            name TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            state TEXT NOT NULL,
            tries INTEGER NOT NULL,
            token INTEGER NOT NULL,
            holder TEXT NOT NULL,
            until REAL NOT NULL,
            not_before REAL NOT NULL,
            reward REAL,
            info TEXT NOT NULL,
            PRIMARY KEY (job, number)
        ) WITHOUT ROWID""",
        "CREATE INDEX trial_state ON trial (job, state, number)",
    ),
    (  # 9: sessions of the web page, and the audit log. key: digest of an API key; until: end of the session
        """CREATE TABLE page_session (
            digest TEXT NOT NULL PRIMARY KEY,
            kind TEXT NOT NULL,
            key TEXT NOT NULL,
            until REAL NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE audit (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            at REAL NOT NULL,
            tenant TEXT NOT NULL,
            key_id TEXT NOT NULL,
            action TEXT NOT NULL,
            target TEXT NOT NULL,
            status INTEGER NOT NULL,
            request_id TEXT NOT NULL,
            address TEXT NOT NULL
        )""",
        "CREATE INDEX audit_at ON audit (at)",
        "CREATE INDEX audit_tenant ON audit (tenant, number)",
        "CREATE INDEX audit_target ON audit (target, number)",
    ),
    (  # 10: snapshots
        """CREATE TABLE snapshot (
            id TEXT NOT NULL PRIMARY KEY,
            tenant TEXT NOT NULL,
            name TEXT,
            worker TEXT NOT NULL,
            sandbox TEXT NOT NULL,
            state TEXT NOT NULL,
            used_at REAL NOT NULL,
            ttl REAL NOT NULL,
            created_at REAL NOT NULL,
            idempotency_key TEXT,
            info TEXT NOT NULL,
            UNIQUE (tenant, name),
            UNIQUE (tenant, idempotency_key)
        ) WITHOUT ROWID""",
        "CREATE INDEX snapshot_worker ON snapshot (worker)",
        "CREATE INDEX snapshot_sandbox ON snapshot (sandbox)",
        "CREATE INDEX snapshot_state ON snapshot (state, used_at)",
    ),
    (  # 11: versions of the live configuration
        "CREATE TABLE configuration (version INTEGER PRIMARY KEY, info TEXT NOT NULL)",
    ),
    (  # 12: warm pools
        """CREATE TABLE pool (
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            info TEXT NOT NULL,
            PRIMARY KEY (tenant, name)
        ) WITHOUT ROWID""",
    ),
    (  # 13: recordings
        """CREATE TABLE recording (
            sandbox TEXT NOT NULL PRIMARY KEY,
            entries INTEGER NOT NULL,
            bytes INTEGER NOT NULL,
            source TEXT,
            repeats TEXT,
            repeated INTEGER NOT NULL,
            diverged_at INTEGER
        ) WITHOUT ROWID""",
        """CREATE TABLE recorded (
            sandbox TEXT NOT NULL,
            key TEXT,
            number INTEGER NOT NULL,
            at REAL NOT NULL,
            finished_at REAL,
            route TEXT NOT NULL,
            method TEXT NOT NULL,
            target TEXT NOT NULL,
            request BLOB,
            request_type TEXT NOT NULL,
            request_bytes INTEGER NOT NULL,
            status INTEGER,
            response BLOB,
            response_type TEXT NOT NULL,
            response_bytes INTEGER NOT NULL,
            snapshot TEXT,
            exact INTEGER NOT NULL,
            memory TEXT NOT NULL,
            PRIMARY KEY (sandbox, number)
        )""",
        "CREATE INDEX recorded_key ON recorded (sandbox, key)",
    ),
    (  # 14: whether the sandboxes of a drained worker are archived
        "ALTER TABLE worker ADD COLUMN evacuating INTEGER NOT NULL DEFAULT 0",
    ),
)

POSTGRES: tuple[tuple[str, ...], ...] = (
    (  # 1: all of SQLite's version 2. facts: the fields that lists filter by
        """CREATE TABLE sandbox (
            id text COLLATE "C" PRIMARY KEY,
            version bigint NOT NULL,
            state text NOT NULL,
            created_at double precision NOT NULL,
            stopped_at double precision,
            tenant text NOT NULL,
            idempotency_key text,
            cpus double precision NOT NULL,
            memory bigint NOT NULL,
            facts jsonb NOT NULL,
            info text NOT NULL,
            config text NOT NULL,
            UNIQUE (tenant, idempotency_key)
        )""",
        "CREATE INDEX sandbox_state ON sandbox (state, created_at)",
        "CREATE INDEX sandbox_created ON sandbox (created_at, id)",
        "CREATE INDEX sandbox_tenant ON sandbox (tenant, state)",
        "CREATE TABLE start (tenant text NOT NULL, at double precision NOT NULL)",
        "CREATE INDEX start_tenant ON start (tenant, at)",
        """CREATE TABLE api_key (
            digest text PRIMARY KEY,
            id text NOT NULL UNIQUE,
            created_at double precision NOT NULL,
            info text NOT NULL
        )""",
        """CREATE TABLE lease (
            name text PRIMARY KEY,
            holder text NOT NULL,
            token bigint NOT NULL,
            until double precision NOT NULL
        )""",
    ),
    (  # 2: workers that joined, as in SQLite's version 3
        """CREATE TABLE worker (
            name text COLLATE "C" PRIMARY KEY,
            holder text NOT NULL,
            url text NOT NULL,
            epoch bigint NOT NULL,
            beat bigint NOT NULL,
            lost boolean NOT NULL,
            draining boolean NOT NULL,
            version text NOT NULL,
            status text NOT NULL,
            seen_at double precision NOT NULL
        )""",
    ),
    (  # 3: facts about the store itself: its identity
        "CREATE TABLE about (name text PRIMARY KEY, value text NOT NULL)",
        "INSERT INTO about VALUES ('identity', md5(random()::text || clock_timestamp()::text))",
    ),
    (  # 4: names, as in SQLite's version 6
        "ALTER TABLE sandbox ADD COLUMN name text",
        """CREATE UNIQUE INDEX sandbox_name ON sandbox (tenant, name)
            WHERE name IS NOT NULL AND state IN ('pending', 'running', 'stopping')""",
    ),
    (  # 5: volumes, as in SQLite's version 7
        """CREATE TABLE volume (
            id text PRIMARY KEY,
            tenant text NOT NULL,
            name text NOT NULL,
            worker text NOT NULL,
            size bigint NOT NULL,
            state text NOT NULL,
            created_at double precision NOT NULL,
            idempotency_key text,
            UNIQUE (tenant, name),
            UNIQUE (tenant, idempotency_key)
        )""",
        "CREATE INDEX volume_worker ON volume (worker)",
    ),
    (  # 6: jobs and their trials, as in SQLite's version 8
        """CREATE TABLE job (
            id text PRIMARY KEY,
            tenant text NOT NULL,
            name text NOT NULL,
            created_at double precision NOT NULL,
            started_at double precision,
            finished_at double precision,
            cancelled int NOT NULL,
            tasks int NOT NULL,
            attempts int NOT NULL,
            labels text NOT NULL,
            idempotency_key text,
            spec text NOT NULL,
            UNIQUE (tenant, idempotency_key)
        )""",
        "CREATE INDEX job_created ON job (tenant, created_at)",
        """CREATE TABLE trial (
            job text NOT NULL,
            number int NOT NULL,
            task int NOT NULL,
            name text NOT NULL,
            attempt int NOT NULL,
            state text NOT NULL,
            tries int NOT NULL,
            token bigint NOT NULL,
            holder text NOT NULL,
            until double precision NOT NULL,
            not_before double precision NOT NULL,
            reward double precision,
            info text NOT NULL,
            PRIMARY KEY (job, number)
        )""",
        "CREATE INDEX trial_state ON trial (job, state, number)",
    ),
    (  # 7: sessions of the web page, and the audit log, as in SQLite's version 9
        """CREATE TABLE page_session (
            digest text PRIMARY KEY,
            kind text NOT NULL,
            key text NOT NULL,
            until double precision NOT NULL
        )""",
        """CREATE TABLE audit (
            number bigserial PRIMARY KEY,
            at double precision NOT NULL,
            tenant text NOT NULL,
            key_id text NOT NULL,
            action text NOT NULL,
            target text NOT NULL,
            status int NOT NULL,
            request_id text NOT NULL,
            address text NOT NULL
        )""",
        "CREATE INDEX audit_at ON audit (at)",
        "CREATE INDEX audit_tenant ON audit (tenant, number)",
        "CREATE INDEX audit_target ON audit (target, number)",
    ),
    (  # 8: snapshots, as in SQLite's version 10
        """CREATE TABLE snapshot (
            id text PRIMARY KEY,
            tenant text NOT NULL,
            name text,
            worker text NOT NULL,
            sandbox text NOT NULL,
            state text NOT NULL,
            used_at double precision NOT NULL,
            ttl double precision NOT NULL,
            created_at double precision NOT NULL,
            idempotency_key text,
            info text NOT NULL,
            UNIQUE (tenant, name),
            UNIQUE (tenant, idempotency_key)
        )""",
        "CREATE INDEX snapshot_worker ON snapshot (worker)",
        "CREATE INDEX snapshot_sandbox ON snapshot (sandbox)",
        "CREATE INDEX snapshot_state ON snapshot (state, used_at)",
    ),
    (  # 9: versions of the live configuration, as in SQLite's version 11
        "CREATE TABLE configuration (version bigint PRIMARY KEY, info text NOT NULL)",
    ),
    (  # 10: warm pools, as in SQLite's version 12
        """CREATE TABLE pool (
            tenant text NOT NULL,
            name text NOT NULL,
            info text NOT NULL,
            PRIMARY KEY (tenant, name)
        )""",
    ),
    (  # 11: recordings, as in SQLite's version 13
        """CREATE TABLE recording (
            sandbox text NOT NULL PRIMARY KEY,
            entries bigint NOT NULL,
            bytes bigint NOT NULL,
            source text,
            repeats text,
            repeated bigint NOT NULL,
            diverged_at bigint
        )""",
        """CREATE TABLE recorded (
            sandbox text NOT NULL,
            key text,
            number bigint NOT NULL,
            at double precision NOT NULL,
            finished_at double precision,
            route text NOT NULL,
            method text NOT NULL,
            target text NOT NULL,
            request bytea,
            request_type text NOT NULL,
            request_bytes bigint NOT NULL,
            status bigint,
            response bytea,
            response_type text NOT NULL,
            response_bytes bigint NOT NULL,
            snapshot text,
            exact bigint NOT NULL,
            memory text NOT NULL,
            PRIMARY KEY (sandbox, number)
        )""",
        "CREATE INDEX recorded_key ON recorded (sandbox, key)",
    ),
    (  # 12: the archives of a drain, as in SQLite's version 14
        "ALTER TABLE worker ADD COLUMN evacuating boolean NOT NULL DEFAULT false",
    ),
)
