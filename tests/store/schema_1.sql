-- A database as version 1 of the schema left it.
PRAGMA user_version = 1;
CREATE TABLE sandbox (
    id TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    stopped_at REAL,
    idempotency_key TEXT UNIQUE,
    info TEXT NOT NULL,
    config TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX sandbox_state ON sandbox (state, created_at);
CREATE INDEX sandbox_created ON sandbox (created_at, id);
INSERT INTO sandbox VALUES ('runs', 2, 'running', 100.0, NULL, 'first key',
    '{"sandbox_id":"runs","state":"running","image":"host","is_alive":true,"worker":"local","memory":"512m","cpus":1.0,"labels":{"team":"a"},"created_at":100.0,"started_at":101.0}',
    '{"image":"host","memory":"512m","cpus":1.0,"labels":{"team":"a"}}');
INSERT INTO sandbox VALUES ('kept', 4, 'stopped', 50.0, 60.0, NULL,
    '{"sandbox_id":"kept","state":"stopped","image":"host","cause":"stopped_by_user","reason":"stopped by its user","worker":"local","memory":"512m","cpus":1.0,"created_at":50.0,"stopped_at":60.0,"kept":true}',
    '{"image":"host","memory":"512m","cpus":1.0,"auto_delete_seconds":3600}');
