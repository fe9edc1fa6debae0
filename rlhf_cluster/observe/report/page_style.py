"""Style of the page, and its content security policy."""

from __future__ import annotations

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a202c;--dim:#5a6577;--line:#d9dee6;--card:#f6f8fa;
--c0:#2b6cb0;--c1:#c05621;--c2:#2f855a;--c3:#b83280;--c4:#6b46c1;--c5:#975a16;--c6:#00768a;--c7:#c53030;
--q0:#9cc4f0;--q1:#d3e5f9;--q3:#fde3c4;--q4:#f8b878}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--fg:#e6eaf0;--dim:#9aa7b8;--line:#323b47;
--card:#1a2028;--c0:#63b3ed;--c1:#f6ad55;--c2:#68d391;--c3:#f687b3;--c4:#b794f4;--c5:#d6bc6a;
--c6:#4fd1c5;--c7:#fc8181;--q0:#1f4d80;--q1:#1b3450;--q3:#4d3517;--q4:#7d4a12}}
*{box-sizing:border-box}body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--bg);
color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
.grid-of{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
figure,.card{margin:0;padding:.7rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem;min-width:0}
figcaption{font-weight:600}svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:12px}.grid{stroke:var(--line)}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dots circle{fill:currentColor}.s1{stroke-dasharray:6 4}.s2{stroke-dasharray:2 3}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.legend{list-style:none;margin:.3rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem .9rem;
font-size:.85rem}.legend li::before{content:"\\2501";margin-right:.35em}
.legend .s1::before{content:"\\2505"}.legend .s2::before{content:"\\2509"}
.legend .s3::before{content:"\\25cf"}
.note,.none,.dim{color:var(--dim);font-size:.85rem;margin:.3rem 0 0}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{overflow-wrap:normal}.pairs th{width:1%;white-space:nowrap;padding-right:2rem}
pre{white-space:pre-wrap;margin:.3rem 0;padding:.5rem;background:var(--bg);
border:1px solid var(--line);border-radius:.3rem;font-size:.85rem}
.tiles{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,11rem),1fr));
margin:1rem 0}.tile{padding:.7rem .9rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem}.tile .name,.tile .more{color:var(--dim);font-size:.85rem;display:block}
.tile .value{font-size:1.7rem;font-weight:650;line-height:1.25;display:block;
font-variant-numeric:tabular-nums}.tile.lead .value{color:var(--c2)}
.large{margin-bottom:1rem}.line.s4{stroke-width:1;opacity:.45}.legend .s4::before{content:"\\2500"}
.sample .reward{margin:0;font-weight:600}.sample .prompt{color:var(--dim)}
.q0{background:var(--q0)}.q1{background:var(--q1)}.q3{background:var(--q3)}.q4{background:var(--q4)}
pre span{border-radius:.15rem}.masked{text-decoration:line-through;opacity:.6}
.step-reward{font-size:.75em;margin:0 .3em;padding:0 .3em;border:1px solid var(--line);
border-radius:.6em;color:var(--c2)}.legend-of-tokens span{padding:0 .2em}
@media(max-width:600px){body{padding:.7rem}.tiles{gap:.5rem;
grid-template-columns:repeat(2,minmax(0,1fr))}.tile .value{font-size:1.1rem}
.for-wide{display:none}
.pairs th{width:45%;white-space:normal;padding-right:.6rem;overflow-wrap:anywhere}}
@media(min-width:601px){.for-narrow{display:none}}
details{margin:.4rem 0}summary{cursor:pointer}.bad{color:var(--c7)}
"""
