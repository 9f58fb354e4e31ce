// Draws objects made of Gaussian splats, all turned by one drag: plain WebGL 2, no library, no network.
//
// view(root, scene): `root` holds a canvas that is hidden and a picture that is not. Where WebGL 2 works they change
// places; where it does not, the picture stays. scene = {columns, radius, focal, dilation, elevation, azimuth, objects:
// [{count, low, size, logs, splats}]}, written by viewer.py. World: +y up, azimuth 0 looks from +z. Cameras: x right,
// y down, z forward. A splat is 16 bytes: x y z (16 bits each), logarithms of three scales, quaternion x y z, red green blue
// opacity (8 bits each).
"use strict";

const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D splats;
uniform vec3 low, size, eye;
uniform vec2 logs;
uniform mat3 view;          // world to camera
uniform float focal;        // in pixels
uniform float pixels;       // the viewport's side
uniform float dilation;     // in square pixels
in uint index;
out vec4 color;
out vec2 place;             // in standard deviations
void main() {
  uvec4 s = texelFetch(splats, ivec2(index % 1024u, index / 1024u), 0);
  vec3 mean = low + size * vec3(s.x & 65535u, s.x >> 16, s.y & 65535u) / 65535.0;
  vec3 scale = exp(logs.x + logs.y * vec3((s.y >> 16) & 255u, s.y >> 24, s.z & 255u) / 255.0);
  vec3 q = (vec3((s.z >> 8) & 255u, (s.z >> 16) & 255u, s.z >> 24) - 127.0) / 127.0;
  float w = sqrt(max(0.0, 1.0 - dot(q, q)));
  color = vec4(s.w & 255u, (s.w >> 8) & 255u, (s.w >> 16) & 255u, s.w >> 24) / 255.0;
  vec3 t = view * (mean - eye);
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
  if (t.z < 0.05 || color.a <= 1.0 / 255.0) return;

  // Columns of the splat's rotation times its scales, then the picture's covariance C = J M M^T J^T.
  mat3 M = view * mat3(
    scale.x * vec3(1.0 - 2.0 * (q.y * q.y + q.z * q.z), 2.0 * (q.x * q.y + w * q.z), 2.0 * (q.x * q.z - w * q.y)),
    scale.y * vec3(2.0 * (q.x * q.y - w * q.z), 1.0 - 2.0 * (q.x * q.x + q.z * q.z), 2.0 * (q.y * q.z + w * q.x)),
    scale.z * vec3(2.0 * (q.x * q.z + w * q.y), 2.0 * (q.y * q.z - w * q.x), 1.0 - 2.0 * (q.x * q.x + q.y * q.y)));
  vec3 depthRow = vec3(M[0].z, M[1].z, M[2].z);
  vec3 a = focal / t.z * (vec3(M[0].x, M[1].x, M[2].x) - t.x / t.z * depthRow);
  vec3 b = focal / t.z * (vec3(M[0].y, M[1].y, M[2].y) - t.y / t.z * depthRow);
  float xx = dot(a, a) + dilation, xy = dot(a, b), yy = dot(b, b) + dilation;
  float middle = 0.5 * (xx + yy), spread = length(vec2(0.5 * (xx - yy), xy));
  float longest = middle + spread, shortest = max(middle - spread, 1e-3);
  vec2 axis = spread < 1e-6 ? vec2(1.0, 0.0) : abs(xy) > 1e-6 ? normalize(vec2(xy, longest - xx))
            : xx > yy ? vec2(1.0, 0.0) : vec2(0.0, 1.0);

  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
  place = corner * sqrt(2.0 * log(255.0 * color.a));                     // there alpha is 1/255
  vec2 offset = place.x * sqrt(longest) * axis + place.y * sqrt(shortest) * vec2(-axis.y, axis.x);
  vec2 position = 2.0 * (focal * t.xy / t.z + offset) / pixels;
  gl_Position = vec4(position.x, -position.y, 0.0, 1.0);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec4 color;
in vec2 place;
out vec4 pixel;
void main() {
  float alpha = min(color.a * exp(-0.5 * dot(place, place)), 0.99);
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(color.rgb * alpha, alpha);
}`;

function view(root, scene) {
  const canvas = root.querySelector("canvas"), picture = root.querySelector("img");
  const gl = canvas.getContext("webgl2", {antialias: false, alpha: false, preserveDrawingBuffer: true});
  if (!gl) return;
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  const uniform = name => gl.getUniformLocation(program, name);

  const objects = scene.objects.map(object => {
    const rows = Math.max(1, Math.ceil(object.count / 1024)), bytes = new Uint8Array(rows * 16384);
    bytes.set(Uint8Array.from(atob(object.splats), letter => letter.charCodeAt(0)));
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) {
      gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
    }
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32UI, 1024, rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT,
                  new Uint32Array(bytes.buffer));
    return {...object, texture, words: new Uint16Array(bytes.buffer), order: new Uint32Array(object.count),
            bin: new Uint16Array(object.count)};
  });
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  const index = gl.getAttribLocation(program, "index");
  gl.enableVertexAttribArray(index);
  gl.vertexAttribIPointer(index, 1, gl.UNSIGNED_INT, 0, 0);
  gl.vertexAttribDivisor(index, 1);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.enable(gl.SCISSOR_TEST);
  gl.clearColor(1, 1, 1, 1);

  // Farthest first, by counting into 4096 bins of depth.
  function sort(object, forward) {
    const {words, order, bin, count, size} = object, starts = new Uint32Array(4097);
    const step = forward.map((value, axis) => value * size[axis] / 65535);
    const reach = step.map(Math.abs).reduce((a, b) => a + b) * 65535 || 1;
    const near = step.reduce((sum, value) => sum + Math.min(0, value) * 65535, 0);
    for (let n = 0; n < count; n++) {
      const depth = words[8 * n] * step[0] + words[8 * n + 1] * step[1] + words[8 * n + 2] * step[2];
      bin[n] = 4095 - Math.min(4095, Math.max(0, (depth - near) / reach * 4095));
      starts[bin[n] + 1]++;
    }
    for (let n = 0; n < 4096; n++) starts[n + 1] += starts[n];
    for (let n = 0; n < count; n++) order[starts[bin[n]]++] = n;
  }

  let {azimuth, elevation} = scene, zoom = 1, waiting = false;
  function draw() {
    waiting = false;
    const side = Math.max(16, Math.round(canvas.clientWidth / scene.columns * (window.devicePixelRatio || 1)));
    const rows = Math.ceil(objects.length / scene.columns);
    if (canvas.width !== side * scene.columns || canvas.height !== side * rows) {
      canvas.width = side * scene.columns;
      canvas.height = side * rows;
    }
    const e = elevation * Math.PI / 180, a = azimuth * Math.PI / 180, distance = scene.radius / zoom;
    const back = [Math.cos(e) * Math.sin(a), Math.sin(e), Math.cos(e) * Math.cos(a)], forward = back.map(v => -v);
    const right = [Math.cos(a), 0, -Math.sin(a)];
    const down = [right[1] * back[2] - right[2] * back[1], right[2] * back[0] - right[0] * back[2],
                  right[0] * back[1] - right[1] * back[0]];
    gl.uniformMatrix3fv(uniform("view"), true, [...right, ...down, ...forward]);
    gl.uniform3fv(uniform("eye"), back.map(v => v * distance));
    gl.uniform1f(uniform("focal"), scene.focal * side);
    gl.uniform1f(uniform("pixels"), side);
    gl.uniform1f(uniform("dilation"), Math.max(0.05, scene.dilation * side * side));    // none falls between pixels
    objects.forEach((object, n) => {
      const x = n % scene.columns * side, y = (rows - 1 - Math.floor(n / scene.columns)) * side;
      gl.viewport(x, y, side, side);
      gl.scissor(x, y, side, side);
      gl.clear(gl.COLOR_BUFFER_BIT);
      sort(object, forward);
      gl.bindTexture(gl.TEXTURE_2D, object.texture);
      gl.uniform3fv(uniform("low"), object.low);
      gl.uniform3fv(uniform("size"), object.size);
      gl.uniform2fv(uniform("logs"), object.logs);
      gl.bufferData(gl.ARRAY_BUFFER, object.order, gl.DYNAMIC_DRAW);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, object.count);
    });
  }
  function redraw() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }
  function turn(x, y) {
    azimuth -= x;
    elevation = Math.max(-89, Math.min(89, elevation + y));
    redraw();
  }

  let held = null;
  canvas.addEventListener("pointerdown", event => {
    held = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!held) return;
    turn((event.clientX - held[0]) / 2, (event.clientY - held[1]) / 2);
    held = [event.clientX, event.clientY];
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
  canvas.addEventListener("wheel", event => {         // only once clicked, else the page could not be scrolled
    if (document.activeElement !== canvas) return;
    event.preventDefault();
    zoom = Math.max(0.5, Math.min(8, zoom * Math.exp(-event.deltaY / 500)));
    redraw();
  }, {passive: false});
  canvas.addEventListener("keydown", event => {
    const by = {ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10]}[event.key];
    if (!by) return;
    event.preventDefault();
    turn(...by);
  });
  canvas.addEventListener("webglcontextlost", () => { canvas.hidden = true; picture.hidden = false; });
  window.addEventListener("resize", redraw);
  picture.hidden = true;
  canvas.hidden = false;
  draw();
}
