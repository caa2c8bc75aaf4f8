# The image of workers: `rocklet` is the entry point. Its user is root of the container, which is an ordinary user of
# the node with hostUsers: false (level A); set runAsUser for level B. docs/guides/kubernetes.md
#
#   python tools/image_context.py build/images --python 3.12
#   docker build -f deploy/images/worker.Dockerfile -t rock-worker:0.1.0 build/images
ARG BASE=python:3.12-slim
FROM ${BASE} AS build
ARG PYTHON=python3
COPY wheels/ /wheels/
RUN ${PYTHON} -m venv --without-pip /opt/rock
RUN ${PYTHON} -m pip --python /opt/rock/bin/python install --no-cache-dir --no-index --find-links /wheels "rock-sandbox[server]"
RUN mkdir -p /prepared/rock && chmod 1777 /prepared/rock

FROM ${BASE}
COPY --from=build /opt/rock /opt/rock
COPY --from=build /prepared/rock /var/lib/rock
ENV ROCK_HOME=/var/lib/rock HOME=/var/lib/rock PATH=/opt/rock/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /var/lib/rock
EXPOSE 8090
ENTRYPOINT ["/opt/rock/bin/rocklet"]
CMD ["--host", "0.0.0.0", "--port", "8090"]
