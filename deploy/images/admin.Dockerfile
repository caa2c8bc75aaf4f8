# The image of admins and readers: `admin` is the entry point, the role is in ROCK_ROLE. It runs as an ordinary user.
#
#   python tools/image_context.py build/images --python 3.12
#   docker build -f deploy/images/admin.Dockerfile -t rock-admin:0.1.0 build/images
#
# The context has all packages as wheels, so a build needs no package index. BASE: an image with Python and pip.
ARG BASE=python:3.12-slim
FROM ${BASE} AS build
ARG PYTHON=python3
COPY wheels/ /wheels/
RUN ${PYTHON} -m venv --without-pip /opt/rock
RUN ${PYTHON} -m pip --python /opt/rock/bin/python install --no-cache-dir --no-index --find-links /wheels "rock-sandbox[server,postgres,rock-conf,otel]"
RUN mkdir -p /prepared/rock && chown 10001:10001 /prepared/rock

FROM ${BASE}
COPY --from=build /opt/rock /opt/rock
COPY --from=build --chown=10001:10001 /prepared/rock /var/lib/rock
ENV ROCK_HOME=/var/lib/rock HOME=/var/lib/rock PATH=/opt/rock/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /var/lib/rock
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["/opt/rock/bin/admin"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
