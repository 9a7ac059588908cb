"""The only folder that imports Ray: actors, the committee over actors, the cluster and the live progress."""
