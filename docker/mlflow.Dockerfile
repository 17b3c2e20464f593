# The MLflow server of docker/compose.yaml: MLflow with the drivers for PostgreSQL and S3.
# docker build -f docker/mlflow.Dockerfile -t mirl_dist_mlflow .
FROM python:3.11-slim-bookworm
COPY constraints.txt /tmp/
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c /tmp/constraints.txt mlflow boto3 psycopg2-binary==2.9.13 \
    && useradd --uid 1000 --create-home mlflow
# The jobs of MLflow's own evaluations are not needed, and cost a gigabyte of memory.
ENV PATH=/venv/bin:$PATH \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /home/mlflow
USER 1000:1000
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]
